"""What `make prove` takes away is there: `make prove` itself is not run with every change."""

from __future__ import annotations

from pathlib import Path

import pytest
from mutations import MUTATIONS, Mutation

import noisytune_cli


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_a_mutation_finds_its_text_once(mutation: Mutation) -> None:
    text = (Path(noisytune_cli.__file__).parent / mutation.file).read_text(encoding="utf-8")
    assert text.count(mutation.old) == 1
