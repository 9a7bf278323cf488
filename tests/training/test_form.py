"""All forms of the state hold the same numbers; in the flat one nothing is done leaf by leaf."""

from __future__ import annotations

import functools
import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax.network.adapt import Network
from ddpm_jax.parallel.devices import Devices
from ddpm_jax.training import form as forms
from ddpm_jax.training import loop, step
from ddpm_jax.training.form import FlatForm, TreeForm, VectorForm, state_form
from ddpm_jax.training.state import abstract_state, init_state
from ddpm_jax.training.step import build_train_step
from tests.support.processes import assert_bit_equal, final_state
from tests.support.tiny import images, tiny_config

BUCKET = 2000  # elements: several buckets for the smallest network


def batch(config, number):
    return {"image": images(config, config.train.batch_size, number)}


def run(config, form, devices, steps=4):
    place = Devices(jax.devices()[:devices])
    state = form.pack(place.replicate(init_state(config)))
    mapped = place.map_step(build_train_step(config, form))
    for number in range(steps):
        state, metrics = mapped(state, place.place(batch(config, number)))
    return state, {name: float(value) for name, value in metrics.items()}


def numbered(config):
    """A state in which leaves of different sizes hold different numbers."""
    return jax.tree.map(
        lambda x: jax.random.normal(jax.random.key(x.size), x.shape).astype(x.dtype),
        init_state(config),
    )


@pytest.mark.parametrize("out_first", [False, True])
def test_packing_loses_nothing(out_first):
    config = tiny_config()
    form, state = FlatForm(config, bucket=BUCKET, out_first=out_first), numbered(config)
    packed = form.pack(state)
    assert 3 <= len(packed.params) <= 8
    assert {leaf.ndim for leaf in packed.params} == {1}
    assert len(jax.tree.leaves(packed)) < 5 * len(packed.params) + 10  # two moments, two averages
    assert_bit_equal(form.unpack(packed), state)
    assert_bit_equal(form.tree(packed.ema["0.9"]), state.ema["0.9"])


def test_vectors_are_joined_and_the_rest_is_left_as_it_is():
    config = tiny_config()
    form, state = VectorForm(config), numbered(config)
    vector, *others = form.pack(state).params
    leaves = jax.tree.leaves(state.params)
    expected = np.concatenate([leaf for leaf in leaves if leaf.ndim == 1])
    assert_bit_equal((vector, others), (expected, [leaf for leaf in leaves if leaf.ndim > 1]))
    assert len(others) < len(leaves) / 2
    packed = form.pack(state)
    assert_bit_equal(form.unpack(packed), state)
    assert_bit_equal(form.tree(packed.ema["0.9"]), state.ema["0.9"])


def test_a_network_without_vectors_is_a_tuple_of_its_leaves():
    """One of the user's own may have scalars, and may have neither them nor vectors."""
    leaves = {"a": jnp.ones((2, 3)), "b": jnp.float32(4), "c": jnp.arange(2.0)}
    for kept, shapes in (("abc", [(3,), (2, 3)]), ("a", [(2, 3)])):
        params = {name: leaves[name] for name in kept}
        form = VectorForm(tiny_config(), Network(lambda key, params=params: params, None))
        joined = form.join(params)
        assert [leaf.shape for leaf in joined] == shapes
        assert_bit_equal(form.split(joined), params)


@pytest.mark.parametrize("out_first", [False, True])
@pytest.mark.parametrize("shape", [(3, 3, 2, 5), (4, 4), (6,), ()])
def test_two_leaves_of_one_shape_in_a_layer_come_back_as_they_were(shape, out_first):
    """A network of the user's own may have two filters where the UNet has bias and scale."""
    draw = np.random.default_rng(0).normal
    params = {name: np.float32(draw(size=shape)) for name in ("w1", "w2")}
    form = FlatForm(tiny_config(), Network(lambda key: params, None), out_first=out_first)
    joined = form.join(params)
    assert_bit_equal(form.split(joined), params)
    # d/dw sum(c w) = c: gradients of the buckets lie as the weights do.
    factors = {name: np.float32(draw(size=shape)) for name in params}
    gradient = jax.grad(lambda w: sum(jnp.vdot(factors[k], v) for k, v in form.split(w).items()))
    assert_bit_equal(gradient(joined), form.join(factors))


def test_a_filter_lies_in_a_bucket_as_gpus_convolve_with_it():
    config = tiny_config()
    form = FlatForm(config)
    params = init_state(config).params
    (vector,) = form.join(params)
    kernel = np.asarray(params["conv_in"]["kernel"])
    start = params["conv_in"]["bias"].size
    np.testing.assert_array_equal(
        vector[start : start + kernel.size], kernel.transpose(3, 0, 1, 2).reshape(-1)
    )
    (vector,) = FlatForm(config, out_first=False).join(params)
    np.testing.assert_array_equal(vector[start : start + kernel.size], kernel.reshape(-1))


def test_a_copy_is_a_copy():
    """What was packed outlives the step that takes the copy's memory."""
    config = tiny_config()
    form, state = FlatForm(config), init_state(config)
    jax.tree.map(lambda leaf: leaf.delete(), form.pack(state))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(state))


@functools.cache
def as_trees(accumulation):
    """What four steps leaf by leaf come to, on two devices, for the tests of the other forms."""
    return run(stepping(accumulation), TreeForm(), 2)


def stepping(accumulation):
    importance = {"loss": {"timestep_sampling": "importance"}} if accumulation > 1 else {}
    return tiny_config(train={"accumulation": accumulation}, **importance)


@pytest.mark.parametrize("accumulation", [1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("form", [functools.partial(FlatForm, bucket=BUCKET), VectorForm])
def test_all_forms_take_the_same_steps(form, accumulation):
    config = stepping(accumulation)
    form = form(config)
    tree, of_tree = as_trees(accumulation)
    state, metrics = run(config, form, 2)
    assert of_tree.keys() == metrics.keys()
    for name, value in of_tree.items():
        assert metrics[name] == pytest.approx(value, rel=1e-5, abs=1e-7), name
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
        form.unpack(state),
        tree,
    )
    for leaf in jax.tree.leaves(state):  # as it is on one device, so on the other
        first, other = (np.asarray(shard.data) for shard in leaf.addressable_shards)
        np.testing.assert_array_equal(first, other)


@pytest.mark.slow
def test_a_run_in_flat_form_resumes_exactly_and_its_checkpoints_are_trees(tmp_path, monkeypatch):
    config = tiny_config(train={"eval_images": 4})
    monkeypatch.setattr(
        loop, "state_form", lambda config, devices, network: FlatForm(config, network, BUCKET)
    )
    two = Devices(jax.devices()[:2])
    loop.train(config, tmp_path / "whole", data_dir=tmp_path, devices=two)
    config.train.steps = 3
    loop.train(config, tmp_path / "cut", data_dir=tmp_path, devices=two)
    config.train.steps = 6
    loop.train(config, tmp_path / "cut", data_dir=tmp_path, devices=two)
    whole, cut = (final_state(config, tmp_path / name) for name in ("whole", "cut"))
    assert jax.tree.structure(whole) == jax.tree.structure(abstract_state(config))
    assert_bit_equal(whole, cut)
    monkeypatch.undo()
    # The same run in the other form: as far as it goes, from where this one stopped.
    config.train.steps = 8
    loop.train(config, tmp_path / "cut", data_dir=tmp_path, devices=two)
    lines = (tmp_path / "cut/metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert rows[-1]["step"] == 8 and np.isfinite(rows[-1]["held_out_loss"])


def test_the_platform_decides():
    config = tiny_config()

    assert state_form(config, SimpleNamespace(platform="tpu")) == VectorForm(config)
    assert state_form(config, SimpleNamespace(platform="gpu")) == FlatForm(config)
    assert state_form(config, Devices()) == FlatForm(config, out_first=False) != FlatForm(config)


# ------------------------------------------------------------------------------- nothing leaf by leaf


def equations(jaxpr):
    """All equations of a program, inside of its functions and loops as well."""
    for equation in jaxpr.eqns:
        yield equation
        for value in jax.tree.leaves(
            list(equation.params.values()),
            is_leaf=lambda v: hasattr(v, "eqns") or hasattr(v, "jaxpr"),
        ):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


def done_to_leaves(config):
    """How many scalars a step sums up, and how many roots of arrays it takes."""
    form = forms.FlatForm(config, bucket=BUCKET)
    state = jax.eval_shape(form.pack, abstract_state(config))
    program = jax.make_jaxpr(build_train_step(config, form))(state, batch(config, 0)).jaxpr
    found = list(equations(program))
    scalars = [
        e for e in found if e.primitive.name == "reduce_sum" and e.outvars[0].aval.shape == ()
    ]
    vectors = {leaf.shape for leaf in state.params}
    roots = [e for e in found if e.primitive.name == "sqrt" and e.outvars[0].aval.shape in vectors]
    all_roots = [e for e in found if e.primitive.name == "sqrt" and e.outvars[0].aval.size > 1]
    return len(state.params), len(scalars), len(roots), len(all_roots)


def test_norms_and_optimizer_go_by_buckets_not_by_leaves(monkeypatch):
    """Four norms, of which the clip's is one that is there already, and the means of the loss."""
    config = tiny_config()
    buckets, sums, roots, all_roots = done_to_leaves(config)
    assert sums <= 4 * buckets + 3
    assert roots == all_roots == buckets  # Adam's

    class OneNorm:
        """optax.tree with a norm that goes leaf by leaf, as all went once."""

        def norm(self, tree):
            return jnp.sqrt(sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(cut(tree))))

    cut = forms.FlatForm(config, bucket=BUCKET).split

    class Optax:
        def __getattr__(self, name):
            return OneNorm() if name == "tree" else getattr(optax, name)

    optax = step.optax
    monkeypatch.setattr(step, "optax", Optax())
    assert (
        done_to_leaves(config)[1]
        > 4 * buckets + 3 + len(jax.tree.leaves(abstract_state(config).params)) / 2
    )
