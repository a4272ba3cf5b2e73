"""An object store as noisytune sees it: what is asked of it, and what its answers mean."""

from __future__ import annotations

import pytest

from noisytune_cli.checkpoint.address import Address
from noisytune_cli.checkpoint.store import Object, Store, StoreFault
from noisytune_cli.errors import UsageError

obstore = pytest.importorskip("obstore", reason="object stores need obstore")


@pytest.fixture
def store() -> Store:
    """A bucket in memory that holds one object."""
    from obstore.store import MemoryStore

    store = Store(Address("s3://bucket/a"))
    store._opened = MemoryStore()
    store.create("a/b", b"0123456789")
    return store


def test_a_store_without_etags_is_held_to_the_length(store: Store) -> None:
    assert store.read(Object("a/b", 10, None), 2, 5) == b"234"
    with pytest.raises(StoreFault) as caught:
        store.read(Object("a/b", 9, None), 2, 5)
    assert caught.value.cause == "changed"


def test_an_etag_may_come_with_and_without_quotation_marks(store: Store) -> None:
    entry = store.head("a/b")
    assert entry is not None
    assert entry.etag is not None
    for etag in (entry.etag, entry.etag.strip('"')):
        assert store.read(entry._replace(etag=etag), 0, 10) == b"0123456789"


def test_what_is_there_is_not_created_again(store: Store) -> None:
    with pytest.raises(StoreFault) as caught:
        store.create("a/b", b"other")
    assert caught.value.cause == "exists"
    assert store.below(10) == {"b": store.head("a/b")}
    assert store.head("a/c") is None


def test_an_address_is_read_once_and_kept_as_it_is() -> None:
    address = Address("s3://bucket/a/b c%20#1/")
    assert (address, address.store, address.key) == ("s3://bucket/a/b c%20#1", "s3://bucket", "a/b c%20#1")
    assert address.parents == ("s3://bucket/a", "s3://bucket")
    assert (Address("gs://b/").key, Address("gs://b/").name) == ("", "b")
    with pytest.raises(UsageError):
        Address("az://b/\n")
