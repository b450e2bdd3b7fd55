"""Programs on disk: loaded while all that they depend on is the same, and never otherwise."""

from __future__ import annotations

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpaged.compilation import cache_folder as files
from jaxpaged.compilation import executable_cache
from jaxpaged.compilation.executable_cache import cached_compile, set_directory


@pytest.fixture(autouse=True)
def folder(tmp_path):
    set_directory(tmp_path / "programs")
    yield tmp_path / "programs"
    set_directory(None)


def times(factor):
    """A jitted function that donates its argument."""
    return jax.jit(lambda x: {"product": x * factor, "sum": x.sum()}, donate_argnums=0)


def ask(factor=3, shape=(4,), dtype=jnp.float32, static=None, name="times"):
    given = (jax.ShapeDtypeStruct(shape, dtype),)
    return cached_compile(
        lambda: times(factor).lower(*given), name, (factor,) if static is None else static, given
    )


def test_a_program_is_found_and_is_the_same():
    first, second = ask(), ask()
    assert (first.cache_hit, second.cache_hit) == (False, True)
    for kept in (first, second):
        x = jnp.arange(4.0)
        out = kept.program(x)
        np.testing.assert_array_equal(out["product"], [0, 3, 6, 9])
        assert out["sum"] == 6 and x.is_deleted()
        assert kept.program.out_info["product"].shape == (4,)


@pytest.mark.parametrize(
    "other",
    [{"factor": 4}, {"shape": (5,)}, {"dtype": jnp.int32}, {"name": "other"}, {"static": (3, "more")}],
)
def test_another_program_is_another(other):
    ask()
    assert not ask(**other).cache_hit
    assert ask(**other).cache_hit and ask().cache_hit


@pytest.mark.parametrize(
    "change",
    [
        lambda patch: patch.setenv("XLA_FLAGS_LIKE", "1"),
        lambda patch: patch.setattr(executable_cache, "_installed", lambda: "another version"),
        lambda patch: patch.setattr(executable_cache, "_environment", lambda: "another machine"),
    ],
)
def test_what_is_around_counts(monkeypatch, change):
    ask()
    change(monkeypatch)
    assert not ask().cache_hit


def test_sources_count(tmp_path):
    package = tmp_path / "package"
    package.mkdir()
    (package / "a.py").write_text("x = 1")
    digests = [executable_cache.source_digest.__wrapped__(package)]
    (package / "a.py").write_text("x = 2")
    digests.append(executable_cache.source_digest.__wrapped__(package))
    (package / "a.py").rename(package / "b.py")
    digests.append(executable_cache.source_digest.__wrapped__(package))
    assert len(set(digests)) == 3


def test_what_cannot_be_described_is_not_kept(folder):
    """An address is another one in the next process, where it may be anything's."""
    for static in ((lambda: 0,), (object(),)):
        assert not ask(static=static).cache_hit and not ask(static=static).cache_hit
    assert not list(folder.iterdir())


def test_a_function_says_what_it_is():
    def model():
        """Closes over everything that its key says."""

    model.program_key = "a model"
    assert not ask(static=(model,)).cache_hit and ask(static=(model,)).cache_hit
    model.program_key = "another model"
    assert not ask(static=(model,)).cache_hit


@pytest.mark.parametrize(
    "damage", [lambda old: b"", lambda old: old[:-9], lambda old: old[:99] + b"x" + old[100:]]
)
def test_a_damaged_file_is_compiled_again(folder, damage):
    ask()
    (path,) = folder.iterdir()
    path.write_bytes(damage(path.read_bytes()))
    assert not ask().cache_hit
    assert ask().cache_hit


def test_what_was_not_used_for_longest_goes(folder, monkeypatch):
    monkeypatch.setattr(files, "MAX_ENTRIES", 2)
    for factor in (1, 2):
        ask(factor)
    for age, path in zip((200, 100), sorted(folder.iterdir(), key=lambda p: p.stat().st_mtime), strict=True):
        os.utime(path, (1e9 - age, 1e9 - age))
    assert ask(1).cache_hit
    ask(3)
    assert ask(1).cache_hit and ask(3).cache_hit and not ask(2).cache_hit


def test_nothing_is_kept_unless_asked_for(folder):
    set_directory(None)
    assert not ask().cache_hit and not ask().cache_hit
    assert not list(folder.iterdir())


def test_a_folder_that_others_may_write_to_is_refused(folder, tmp_path, monkeypatch):
    """Programs are pickles: who writes one runs code as whoever reads it."""
    assert folder.stat().st_mode & 0o077 == 0
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        set_directory(tmp_path / "file" / "programs")
    for mode in (0o777, 0o770, 0o702):
        folder.chmod(mode)
        with pytest.raises(PermissionError, match="another user owns it or may write to it"):
            set_directory(folder)
    folder.chmod(0o755)
    set_directory(folder)
    monkeypatch.setattr(os, "getuid", lambda: folder.stat().st_uid + 1)
    with pytest.raises(PermissionError, match="another user owns it or may write to it"):
        set_directory(folder)


def test_a_file_that_others_may_write_to_is_compiled_again(folder, monkeypatch):
    assert not ask().cache_hit and ask().cache_hit
    (path,) = folder.iterdir()
    assert path.stat().st_mode & 0o777 == 0o600
    path.chmod(0o666)
    assert not ask().cache_hit and ask().cache_hit
    with monkeypatch.context() as patch:
        patch.setattr(os, "getuid", lambda: path.stat().st_uid + 1)
        assert not ask().cache_hit


def test_jaxs_own_cache_goes_on(tmp_path):
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "xla"))
    try:
        ask()
        assert jax.config.jax_compilation_cache_dir == str(tmp_path / "xla")
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
