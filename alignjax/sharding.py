"""The mesh and where every array lies on it. The only file that names mesh axes.

Shardings are explicit (JAX's default since 0.9): `use_mesh` is called once, by the command, and
arrays are born with the sharding that `spec` gives. Everything else speaks of logical axes.
"""

import math

import jax
import numpy as np
from jax.experimental import mesh_utils, multihost_utils

from alignjax.errors import UserError

AXES = ("replica", "fsdp", "tensor")

# Logical axis -> mesh axis. An axis that is not here, or None, is not split.
RULES = {
    "batch": ("replica", "fsdp"),  # rows of a batch
    "replicas": "replica",  # rows of a batch where "embed" splits another dimension
    "embed": "fsdp",  # model dimension of the weights; gathered where a weight is used
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "vocab": "tensor",
}


def spec(*axes: str | None) -> jax.P:
    """Partition of an array whose dimensions carry these logical axes."""
    _mesh_shape()
    return jax.P(*(None if axis is None else RULES[axis] for axis in axes))


def gathered(stored: jax.P) -> jax.P:
    """Partition in which a weight stored as `stored` is used: whole along the model dimension."""
    return jax.P(*(None if axis == RULES["embed"] else axis for axis in stored))


def use_mesh(replica: int = 1, fsdp: int = -1, tensor: int = 1) -> jax.sharding.Mesh:
    """Sets the mesh for the process; one size may be -1 and takes the devices left over."""
    devices = jax.device_count()
    sizes = [replica, fsdp, tensor]
    given = math.prod(size for size in sizes if size != -1)
    if sizes.count(-1) == 1 and given > 0 and devices % given == 0:
        sizes[sizes.index(-1)] = devices // given
    if min(sizes) < 1 or math.prod(sizes) != devices:
        raise UserError(
            f"mesh replica={replica} x fsdp={fsdp} x tensor={tensor} does not fit {devices} "
            f"devices: make the product {devices}, or set one of the sizes to -1."
        )
    try:
        mesh = jax.make_mesh(tuple(sizes), AXES)
    except NotImplementedError:  # an axis that is no product of a TPU's physical axes
        split = mesh_utils.create_device_mesh(sizes, allow_split_physical_axes=True)
        mesh = jax.sharding.Mesh(split, AXES, (jax.sharding.AxisType.Explicit,) * len(AXES))
    jax.set_mesh(mesh)
    return mesh


def _mesh_shape() -> dict[str, int]:
    shape = jax.sharding.get_abstract_mesh().shape
    if not shape:
        raise UserError("no mesh is in use: call alignjax.sharding.use_mesh() first.")
    return shape


def axis_size(axis: str) -> int:
    """Number of parts into which the mesh in use splits a logical axis."""
    shape = _mesh_shape()
    rule = RULES[axis]
    return int(np.prod([shape[name] for name in ((rule,) if isinstance(rule, str) else rule)]))


def check_divides(dimensions: dict[str, tuple[int, str]]) -> None:
    """Refuses a model that the mesh cannot split evenly.

    `dimensions` maps what a user calls a dimension to its size and logical axis.
    """
    for name, (size, axis) in dimensions.items():
        if not _divides(axis_size(axis), size, axis):
            mine = [one for one in dimensions.values() if RULES[one[1]] == RULES[axis]]
            most = max(other for other, _ in mine)
            works = [str(n) for n in range(1, most + 1) if all(_divides(n, *one) for one in mine)]
            raise UserError(
                f"The model's {name} ({size}) cannot be split over mesh.{RULES[axis]}="
                f"{axis_size(axis)}; sizes that work for this model: {', '.join(works)}."
            )


def _divides(parts: int, size: int, axis: str) -> bool:
    """Whether so many devices can share a dimension; key/value heads may have copies on several."""
    return size % parts == 0 or (axis == "kv_heads" and parts % size == 0)


def place(tree, *axes: str | None):
    """Puts host arrays on the mesh, their leading dimensions split as the logical `axes` say.

    Every process passes the same whole arrays and keeps its own part.
    """
    sharding = jax.sharding.NamedSharding(jax.sharding.get_mesh(), spec(*axes))

    def put(array):
        array = np.asarray(array)
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    return jax.tree.map(put, tree)


def local_rows(rows: int) -> np.ndarray:
    """Which of a micro-batch's rows lie on this process's devices, int64, ascending."""
    sharding = jax.sharding.NamedSharding(jax.sharding.get_mesh(), spec("batch"))
    slices = [index[0] for index in sharding.addressable_devices_indices_map((rows,)).values()]
    return np.unique(np.concatenate([np.arange(rows)[part] for part in slices]))


def place_rows(tree, rows: int):
    """Puts micro-batches [A, rows, ...] on the mesh, split by rows.

    A process passes [A, local, ...], the rows that `local_rows(rows)` names, and no others.
    """
    sharding = jax.sharding.NamedSharding(jax.sharding.get_mesh(), spec(None, "batch"))
    held = local_rows(rows)

    def put(array):
        def part(index):
            start, end, _ = index[1].indices(rows)
            at = np.searchsorted(held, start)
            return array[:, at : at + end - start]

        shape = (array.shape[0], rows, *array.shape[2:])
        return jax.make_array_from_callback(shape, sharding, part)

    return jax.tree.map(put, tree)


def to_host(array: jax.Array) -> np.ndarray:
    """The whole of a sharded array, on every process."""
    if array.is_fully_addressable:
        return np.asarray(array)
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def concrete(abstract):
    """Abstract arrays from `jax.eval_shape`, each with a sharding on the mesh in use."""
    mesh = jax.sharding.get_mesh()

    def resolve(leaf):
        stored = jax.P() if leaf.sharding is None else leaf.sharding.spec
        return jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=jax.sharding.NamedSharding(mesh, stored)
        )

    return jax.tree.map(resolve, abstract)
