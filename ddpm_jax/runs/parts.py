"""Read parts of a checkpoint's state, and know each to be what was saved.

A checkpoint has a SHA-256 of its whole content and, but for those of early versions, one of each
part: the weights, each average, the optimizer's state. To sample from an average takes that alone.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import jax
import orbax.checkpoint as ocp

from ddpm_jax.runs.storage import WHOLE, content_hashes, part_of

PARTS = "sha256_of_parts"  # in the metadata of a checkpoint


def describe_content(state: Any) -> dict[str, Any]:
    """Return the metadata that `is_as_saved` looks for: the hashes of a state and its parts."""
    hashes = content_hashes(state)
    return {"sha256": hashes.pop(WHOLE), PARTS: hashes}


def read_parts(
    manager: ocp.CheckpointManager,
    step: int,
    like: Any,
    saved: dict[str, Any],
    parts: Collection[str] | None,
) -> Any:
    """Read parts of checkpoint `step`, and check them.

    Args:
      like: a state, as arrays or shapes with shardings.
      saved: the metadata of the checkpoint.
      parts: those that are wanted; None for all.

    Returns:
      A tree as `like`, with `...` for each leaf of another part.

    Raises:
      ValueError: it is not what was saved. What the storage library raises comes as it is.
    """
    asked = ask_for(like, saved, parts)
    how = ocp.checkpoint_utils.construct_restore_args(asked)
    state = manager.restore(step, args=ocp.args.PyTreeRestore(asked, how))
    if not is_as_saved(state, saved, parts):
        raise ValueError("its content is not what was saved")
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf if parts is None or part_of(path) in parts else ocp.PLACEHOLDER,
        state,
    )


def ask_for(like: Any, saved: dict[str, Any], parts: Collection[str] | None) -> Any:
    """Return what Orbax is to read: shapes, or `...` for a leaf that is not read."""
    # Early versions have a hash of the whole alone: to check it the other parts are read as well.
    # Without a sharding they stay in the memory of the host.
    to_check = PARTS not in saved and "sha256" in saved

    def ask(path: Any, leaf: Any) -> Any:
        leaf = ocp.utils.to_shape_dtype_struct(leaf)
        if parts is None or part_of(path) in parts:
            return leaf
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) if to_check else ocp.PLACEHOLDER

    return jax.tree_util.tree_map_with_path(ask, like)


def is_as_saved(state: Any, saved: dict[str, Any], parts: Collection[str] | None) -> bool:
    """Return whether what was read has the hashes that it was saved with, as far as it has any."""
    found, hashes = content_hashes(state), saved.get(PARTS)
    if parts is None or hashes is None:
        return saved.get("sha256") in (None, found[WHOLE])
    return all(found.get(part) == hashes.get(part) for part in parts)
