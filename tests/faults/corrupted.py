"""Each file of a checkpoint, damaged in each way: which step is restored then, and is it right?"""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

DAMAGES = ("a flipped byte", "cut in half", "deleted")
# of the step itself: no restore reads them
_UNREAD = {"_CHECKPOINT_METADATA", "commit_success.txt"}


def damage(path: Path, how: str) -> None:
    content = path.read_bytes()
    if how == "deleted":
        path.unlink()
    elif how == "cut in half":
        path.write_bytes(content[: len(content) // 2])
    else:
        middle = len(content) // 2
        path.write_bytes(content[:middle] + bytes([content[middle] ^ 0x10]) + content[middle + 1 :])


def every_file(job, run: Path, scratch: Path) -> str:
    """Restores as train.py does, in this process. Raises AssertionError."""
    import jax

    from ttt_jax.checkpoint.checkpointer import Checkpointer
    from ttt_jax.parallel.mesh import make_mesh
    from ttt_jax.run.folder import read_run_config
    from ttt_jax.training.step import abstract_state

    config = read_run_config(run)
    abstract, _ = abstract_state(config, make_mesh(config.mesh))

    def restore(folder: Path) -> tuple[int, str, list[str]]:
        warned: list[str] = []
        with Checkpointer(folder, config.checkpoint, warned.append) as checkpointer:
            found = checkpointer.restore_newest(model=abstract.model, opt_state=abstract.opt_state)
        assert found is not None
        step, restored = found
        digest = hashlib.sha256(repr((restored.data_state, restored.extra)).encode())
        for leaf in jax.tree.leaves(restored[:2]):
            digest.update(jax.device_get(leaf).tobytes())
        return step, digest.hexdigest(), warned

    source = run / "checkpoints"
    steps = sorted(int(entry.name) for entry in source.iterdir() if entry.name.isdecimal())
    newest, older = steps[-1], steps[-2]
    shutil.rmtree(scratch, ignore_errors=True)
    shutil.copytree(source, scratch)
    expected = {newest: restore(scratch)[1]}
    shutil.rmtree(scratch / str(newest))
    expected[older] = restore(scratch)[1]
    files = sorted(
        p.relative_to(source / str(newest))
        for p in (source / str(newest)).rglob("*")
        if p.is_file()
    )
    fell_back = unread = 0
    for file in files:
        for how in DAMAGES:
            if how != "deleted" and not (source / str(newest) / file).stat().st_size:
                continue  # nothing to flip or to cut
            shutil.rmtree(scratch)
            shutil.copytree(source, scratch)
            damage(scratch / str(newest) / file, how)
            step, digest, warned = restore(scratch)
            assert digest == expected[step], f"{file} {how}: what was restored is not step {step}"
            if str(file) in _UNREAD:
                assert (step, warned) == (newest, []), f"{file} {how}: step {step}, {warned}"
                unread += 1
            else:
                assert step == older, f"{file} {how}: not noticed"
                assert len(warned) == 1, warned
                assert f"{newest}: damaged ({file.as_posix()}: " in warned[0], warned
                assert (scratch / f"{newest}.damaged").is_dir()
                fell_back += 1
    return (
        f"{len(files)} files x {len(DAMAGES)} damages: {fell_back} named the file and used the "
        "step before, "
        f"{unread} do not matter for what is read"
    )
