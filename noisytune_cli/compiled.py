"""Compile a loop once, keep its machine code.

Numba compiles the loops of `kernels.py`; importing it and its type registries costs more than perturbing a
small model. So what it produced is kept: the LLVM IR of each loop, compiled for this very CPU, is stored as
an object file, and the next process maps that object with llvmlite alone, without Numba.

A loop is a C function of pointers and numbers. It may call nothing but LLVM intrinsics and a few functions
of the C library (checked when it is compiled), so that an object never needs Numba's runtime. An object's
name holds a digest of everything it depends on, and its content is checked before it is mapped. The cache
lies beside the package, else in the user's cache folder, else in a private folder of the temporary one;
where none is writable, each process compiles for itself.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import importlib.metadata
import os
import stat
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llvmlite.binding import ExecutionEngine, TargetMachine

#: The C types of a signature's letters: pointer, i64, u64, f32, f64.
_C_TYPES: dict[str, Any] = {
    "p": ctypes.c_void_p,
    "i": ctypes.c_int64,
    "u": ctypes.c_uint64,
    "f": ctypes.c_float,
    "d": ctypes.c_double,
}

_SYMBOL = "noisytune_loop"
#: The modules, beside the distributions, whose text decides what a loop is compiled to.
_SOURCES = (
    "compiled.py",
    "devices/cpu.py",
    "kernels.py",
    "moments.py",
    "philox_vectors.py",
    "register_sums.py",
    "registers.py",
    "stored.py",
    "stream.py",
    "sums.py",
    "tables.py",
    "vectors.py",
)

_C_LIBRARY = {"memcpy", "memmove", "memset", "sqrt"}
_DIGEST_SIZE = 32
_lock = threading.Lock()
_engines: list[ExecutionEngine] = []
_loops: dict[str, Loop] = {}
_modules: dict[str, int] = {}


class Loop:
    """The machine code of a loop, to be called with its arguments; the GIL is released while it runs."""

    def __init__(self, address: int, signature: str) -> None:
        self.address, self.signature = address, signature
        # Numba's calling convention: two result slots come first, and a status comes back.
        types = [_C_TYPES[letter] for letter in signature]
        self._slots = (ctypes.c_int64 * 2)()
        value_slot = ctypes.addressof(self._slots)
        function = ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.c_void_p, ctypes.c_void_p, *types)(address)
        self._function = functools.partial(function, value_slot, value_slot + 8)

    def __call__(self, *arguments: Any) -> None:
        """Run the loop."""
        if status := self._function(*arguments):
            raise RuntimeError(f"a compiled loop ended with status {status}")


def compile_loop(name: str, signature: str, make: Callable[[], Callable[..., None]]) -> Loop:
    """Return a loop, compiled or from the cache.

    `signature` has one letter for each argument (`_C_TYPES`); the loop returns nothing. `make` builds the
    Python function and is called only where the cache has no object for `name`.
    """
    with _lock, _saying_that_memory_ran_out():
        if name not in _loops:
            _loops[name] = Loop(_mapped(name, lambda: _compile(signature, make())), signature)
        return _loops[name]


def compile_module(name: str, make: Callable[[], str]) -> int:
    """Return the address of the only function of a module in LLVM IR, compiled or from the cache."""
    with _lock, _saying_that_memory_ran_out():
        if name not in _modules:
            _modules[name] = _mapped(name, lambda: _emit(make()))
        return _modules[name]


def _mapped(name: str, make: Callable[[], bytes]) -> int:
    """Return the address of an object from the cache, or else made now."""
    code = _cached(name)
    if code is None:
        code = make()
        _store(name, code)
    return _map(code)


@contextlib.contextmanager
def _saying_that_memory_ran_out() -> Iterator[None]:
    """Raise MemoryError where llvmlite says that its library is missing and there was no room to map it."""
    try:
        yield
    except OSError as error:
        if "failed to map segment" in str(error.__context__):
            raise MemoryError from error
        raise


def _cached(name: str) -> bytes | None:
    """Return the stored object, or None where there is none that is whole."""
    for folder in _folders():
        with contextlib.suppress(OSError):
            if _is_ours(folder):
                content = (folder / _file_name(name)).read_bytes()
                digest, code = content[:_DIGEST_SIZE], content[_DIGEST_SIZE:]
                if digest == hashlib.sha256(code).digest():
                    return code
    return None


def _store(name: str, code: bytes) -> None:
    """Keep an object in the first folder that takes it; the cache is a convenience, so none is no error."""
    for folder in _folders():
        with contextlib.suppress(OSError):
            if folder.name != "__pycache__":  # that one Python makes, for all who may read the package
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if _is_ours(folder):
                _write_whole(folder / _file_name(name), hashlib.sha256(code).digest() + code)
                return


def _write_whole(path: Path, content: bytes) -> None:
    """Write a file so that a process that reads it meanwhile sees all of it or what was there before."""
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix="noisytune-")
    try:
        with os.fdopen(descriptor, "wb") as file:
            os.fchmod(file.fileno(), 0o644)  # who may read is for the folder to say
            file.write(content)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def _compile(signature: str, function: Callable[..., None]) -> bytes:
    """Compile a function with Numba to the bytes of an object file for this CPU."""
    import numba
    from llvmlite import binding

    types = {
        "p": numba.types.voidptr,
        "i": numba.types.int64,
        "u": numba.types.uint64,
        "f": numba.types.float32,
        "d": numba.types.float64,
    }
    arguments = [types[letter] for letter in signature]
    binding.initialize_native_asmparser()  # a loop may hold an instruction in assembly
    compiled = numba.cfunc(numba.void(*arguments), error_model="numpy")(function)
    module = binding.parse_assembly(compiled.inspect_llvm())
    # Beside the function stands a wrapper that reports Python exceptions; nothing else needs Python.
    entry = compiled.native_name.removeprefix("cfunc.")
    for candidate in module.functions:
        if not candidate.is_declaration:
            candidate.linkage = "external" if candidate.name == entry else "internal"
    machine = _machine()
    passes = binding.create_new_module_pass_manager()
    passes.add_global_dead_code_eliminate_pass()
    passes.add_strip_dead_prototype_pass()
    passes.run(module, binding.create_pass_builder(machine, binding.PipelineTuningOptions()))
    foreign = {f.name for f in module.functions if f.is_declaration and not f.name.startswith("llvm.")}
    if foreign - _C_LIBRARY:
        # LLVM would end the process on mapping such an object; it is our bug, or a change in Numba.
        raise RuntimeError(f"a compiled loop calls {', '.join(sorted(foreign))}")
    module.get_function(entry).name = _SYMBOL
    return bytes(machine.emit_object(module))


def _emit(text: str) -> bytes:
    """Compile a module of one function to the bytes of an object file for this CPU."""
    from llvmlite import binding

    machine = _machine()
    module = binding.parse_assembly(text)
    (function,) = module.functions
    function.name = _SYMBOL
    return bytes(machine.emit_object(module))


def _map(code: bytes) -> int:
    """Map an object file into the process and return the address of its loop."""
    from llvmlite import binding

    empty = binding.parse_assembly("")
    engine = binding.create_mcjit_compiler(empty, _machine())
    engine.add_object_file(binding.ObjectFileRef.from_data(code))
    engine.finalize_object()
    _engines.append(engine)  # the code lives as long as its engine
    return int(engine.get_function_address(_SYMBOL))


def _machine() -> TargetMachine:
    """Return this CPU's target machine."""
    from llvmlite import binding

    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    target = binding.Target.from_default_triple()
    cpu, features = binding.get_host_cpu_name(), _features()
    return target.create_target_machine(
        cpu=cpu, features=features, opt=3, jit=True, reloc="default", codemodel="jitdefault"
    )


def _features() -> str:
    from llvmlite import binding

    try:
        return str(binding.get_host_cpu_features().flatten())
    except RuntimeError:  # LLVM cannot tell them on every architecture; the CPU's name then stands alone
        return ""


@functools.cache
def _stamp() -> str:
    """Digest everything that an object depends on: sources, compiler versions, CPU, Python's platform."""
    from llvmlite import binding

    digest = hashlib.sha256()
    package = Path(__file__).parent
    for module in _SOURCES:
        digest.update((package / module).read_bytes() + b"\0")
    for path in sorted((package / "distributions").glob("*.py")):
        digest.update(path.read_bytes() + b"\0")
    versions = [importlib.metadata.version(p) for p in ("numba", "llvmlite", "numpy")]
    machine = [binding.get_host_cpu_name(), _features(), sys.platform, sys.version]
    digest.update("\0".join(versions + machine).encode())
    return digest.hexdigest()[:32]


def _file_name(name: str) -> str:
    return f"noisytune-{name.replace('/', '-')}-{_stamp()}.o"


def _folders() -> list[Path]:
    """Return the cache folders in the order they are tried; they need not exist."""
    folders = [Path(__file__).parent / "__pycache__"]
    home = os.environ.get("HOME", "")
    user = os.environ.get("XDG_CACHE_HOME", "") or (home and f"{home}/.cache")
    if os.path.isabs(user):  # a relative one would take machine code from wherever the process was started
        folders.append(Path(user) / "noisytune")
    with contextlib.suppress(FileNotFoundError):  # there may be no temporary folder to write to
        folders.append(Path(tempfile.gettempdir()) / f"noisytune-cache-{os.getuid()}")
    return folders


def _is_ours(folder: Path) -> bool:
    """Say whether a folder is real and only this user and root can write to it; OSError if absent."""
    status = folder.lstat()
    shared = status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    return stat.S_ISDIR(status.st_mode) and status.st_uid in {os.getuid(), 0} and not shared
