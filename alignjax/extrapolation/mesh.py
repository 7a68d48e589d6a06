"""theta + alpha (theta - theta_sft) on the mesh: two models are loaded once, for every alpha."""

import jax
import jax.numpy as jnp
import numpy as np

from alignjax.extrapolation.alphas import Place, Rules, loaded, of_tensors
from alignjax.extrapolation.arithmetic import rounded
from alignjax.models.decoder import Decoder
from alignjax.models.families import tensor_names
from alignjax.models.shapes import is_stacked
from alignjax.weights.source import leaf_name

_BITS = {2: jnp.uint16, 4: jnp.uint32}  # bytes of a float -> integers of that size


def extrapolate(strong, weak, alpha):
    """theta + alpha (theta - theta_sft) of two pytrees of arrays, for the inside of `jax.jit`.

    Leaves keep theta's dtype and sharding; the arithmetic is float32, rounded once. `alpha` is a
    number, traced or not, or a pytree of them as `leaf_alphas` gives it, each of which broadcasts
    to its leaf. Where it is 0 or -1 the result is theta or theta_sft to the last bit.
    """
    if jax.tree.structure(alpha) != jax.tree.structure(strong):
        alpha = jax.tree.map(lambda _: alpha, strong)
    return jax.tree.map(_leaf, strong, weak, alpha)


def _leaf(theta, theta_sft, alpha):
    alpha = jnp.asarray(alpha, jnp.float32)
    wide = theta.astype(jnp.float32)
    product = alpha * (wide - theta_sft.astype(jnp.float32))
    zero = (alpha != alpha).astype(jnp.uint32)  # but of NaN, so the compiler cannot know
    moved = (wide + rounded(product, zero)).astype(theta.dtype)
    # As integers: what a NaN carries would not outlive a float's way through the processor.
    kind = _BITS[theta.dtype.itemsize]
    bits = [
        jax.lax.bitcast_convert_type(one.astype(theta.dtype), kind)
        for one in (theta, theta_sft, moved)
    ]
    chosen = jnp.where(alpha == 0, bits[0], jnp.where(alpha == -1, bits[1], bits[2]))
    return jax.lax.bitcast_convert_type(chosen, theta.dtype)


def leaf_alphas(model: Decoder, rules: Rules, alpha: float) -> Decoder:
    """The alpha of each leaf by the rules of `alignjax.expo`, float32: [], or of blocks [L, 1...].

    They are arrays, not parts of the program, so other rules compile nothing anew.
    """
    leaves = jax.tree_util.tree_leaves_with_path(model)
    names = {
        leaf_name(path): tensor_names(leaf_name(path), model.config.layers) for path, _ in leaves
    }
    places = {
        name: Place(leaf, layer if is_stacked(leaf) else None)
        for leaf, tensors in names.items()
        for layer, name in enumerate(tensors)
    }
    found = of_tensors(loaded(rules), alpha, places)

    def of_leaf(path, array):
        values = np.array([found[name] for name in names[leaf_name(path)]], np.float32)
        if is_stacked(leaf_name(path)):
            return values.reshape(-1, *(1 for _ in array.shape[1:]))
        return values[0]

    return jax.tree_util.tree_map_with_path(of_leaf, model)
