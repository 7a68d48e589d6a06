"""Collectives read from programs written by hand, and from one that XLA compiles for eight CPUs."""

from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from compiled import Transfer, dump_options, dumped, transfers
from conftest import mesh

from alignjax.sharding import spec

HEAD = "HloModule jit_f, is_scheduled=true\n\n"

LOOP = """
%cond (p: (s32[], bf16[4,16])) -> pred[] {
  %end = s32[]{:T(128)} constant(6)
  %p = (s32[]{:T(128)}, bf16[4,16]{1,0:T(8,128)(2,1)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %end), direction=LT
}

%body (p: (s32[], bf16[4,16])) -> (s32[], bf16[4,16]) {
  %step = s32[]{:T(128)} constant(STEP)
  %p.1 = (s32[]{:T(128)}, bf16[4,16]{1,0:T(8,128)(2,1)}) parameter(0)
  %i.1 = s32[]{:T(128)} get-tuple-element(%p.1), index=0
  %next = s32[]{:T(128)} add(%i.1, %step)
  %w = bf16[4,16]{1,0:T(8,128)(2,1)S(1)} get-tuple-element(%p.1), index=1
  %sent = (bf16[4,16]{1,0}, bf16[4,16]{1,0}, u32[], u32[]) collective-permute-start(%w), PAIRS
  %got = bf16[4,16]{1,0} collective-permute-done(%sent)
  ROOT %t = (s32[], bf16[4,16]) tuple(%next, %got)
}

ENTRY %main (w: bf16[4,16]) -> (s32[], bf16[4,16]) {
  %start = s32[]{:T(128)} constant(START)
  %w.1 = bf16[4,16]{1,0} parameter(0)
  %copied = s32[]{:T(128)} copy(%start)
  %init = (s32[], bf16[4,16]) tuple(%copied, /*index=1*/%w.1)
  ROOT %loop = (s32[], bf16[4,16]) while(%init), condition=%cond, body=%body
}
"""

PAIRS = 'source_target_pairs={{0,1},{1,0}}, metadata={op_name="jit(f)/while/ring"}'
LOOP = LOOP.replace("PAIRS", PAIRS)

FUSED = """
%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%all-reduce-scatter.1 (g: f32[8,4]) -> f32[2,4] {
  %g = f32[8,4]{1,0} parameter(0)
  %whole = f32[8,4]{1,0} all-reduce(%g), replica_groups={{0,2,4,6},{1,3,5,7}}, to_apply=%add
  ROOT %part = f32[2,4]{1,0} dynamic-slice(%whole, %g), dynamic_slice_sizes={2,4}
}

ENTRY %main (g: f32[8,4]) -> f32[2,4] {
  %g.1 = f32[8,4]{1,0} parameter(0)
  ROOT %part.1 = f32[2,4]{1,0} fusion(%g.1), calls=%all-reduce-scatter.1, metadata={op_name="g"}
}
"""


def entry(*lines: str) -> str:
    body = "\n".join(f"  {line}" for line in lines)
    return f"{HEAD}ENTRY %main (x: f32[2,3]) -> f32[2,3] {{\n{body}\n}}\n"


@pytest.mark.parametrize("start, step, turns", [(0, 1, 6), (0, 2, 3), (1, 2, 3), (2, 1, 4)])
def test_a_ring_in_a_loop_counts_each_turn(start, step, turns):
    text = HEAD + LOOP.replace("STEP", str(step)).replace("START", str(start))
    (one,) = transfers(text)
    assert one == Transfer("collective-permute", "bf16", (4, 16), 2, turns, "jit(f)/while/ring")
    assert one.received == turns * 4 * 16 * 2


def test_a_counter_taken_from_its_tuple_in_passing_is_followed():
    """XLA's newer way of writing it."""
    text = LOOP.replace("compare(%i, %end)", "compare(%p#0, %end)").replace("%i.1,", "%p.1#0,")
    text = text.replace("STEP", "3").replace("START", "0").replace("while(%init)", "while(%copies)")
    text = text.replace("  ROOT %loop", "  %copies = (s32[], bf16[4,16]) copy(%init)\n  ROOT %loop")
    assert transfers(HEAD + text)[0].times == 2


def test_a_trip_count_that_xla_writes_is_taken():
    known = 'body=%body, backend_config={"known_trip_count":{"n":"5"}}'
    text = HEAD + LOOP.replace("body=%body", known).replace("constant(6)", "parameter(1)")
    assert transfers(text)[0].times == 5


def test_a_loop_whose_end_is_computed_counts_once():
    text = LOOP.replace("%end = s32[]{:T(128)} constant(6)", "%end = s32[] add(%p, %p)")
    assert transfers(HEAD + text)[0].times == 1


def test_a_loop_that_counts_in_an_unknown_way_is_refused():
    text = HEAD + LOOP.replace("add(%i.1, %step)", "multiply(%i.1, %step)")
    with pytest.raises(ValueError) as error:
        transfers(text.replace("STEP", "2").replace("START", "1"))
    assert str(error.value) == "loop: the reader does not see how this loop counts."


def test_an_all_reduce_that_keeps_a_part_is_a_reduce_scatter_with_its_fusions_name():
    (one,) = transfers(HEAD + FUSED)
    assert one == Transfer("reduce-scatter", "f32", (8, 4), 4, 1, "g")
    assert one.received == 8 * 4 * 4 * 3 / 4


@pytest.mark.parametrize(
    "line, kind, dtype, shape, group, received",
    [
        (
            "%a = bf16[8,3]{1,0} all-gather(%x), replica_groups=[2,4]<=[4,2]T(1,0), dimensions={0}",
            *("all-gather", "bf16", (8, 3), 4, 8 * 3 * 2 * 3 / 4),
        ),
        (
            "%a = (f32[2,3]{1,0}, f32[16,3]{1,0}) all-gather-start(%x), "
            "replica_groups=mesh['a'=2,'b'=2,'c'=2] {'a','b','c'}, dimensions={0}",
            *("all-gather", "f32", (16, 3), 8, 16 * 3 * 4 * 7 / 8),
        ),
        (
            "%a = bf16[8,3]{1,0} all-gather(%x), replica_groups=mesh['a'=4,'b'=8], "
            "device_ids=([8,4]T(1,0)) {'a','b':(1)2}, dimensions={0}",
            *("all-gather", "bf16", (8, 3), 8, 8 * 3 * 2 * 7 / 8),
        ),
        (
            "%a = f32[2,3]{1,0} reduce-scatter(%x), replica_groups={{0,1}}, dimensions={1}",
            *("reduce-scatter", "f32", (2, 6), 2, 2 * 6 * 4 / 2),
        ),
        (
            "%a = f32[2,3]{1,0} all-reduce-start(%x), replica_groups={{0,1,2,3}}, to_apply=%add",
            *("all-reduce", "f32", (2, 3), 4, 2 * 2 * 3 * 4 * 3 / 4),
        ),
        (
            "%a = s8[2,3]{1,0} all-to-all(%x), replica_groups={{0,1}}, dimensions={0}",
            *("all-to-all", "s8", (2, 3), 2, 2 * 3 / 2),
        ),
    ],
)
def test_each_kind(line, kind, dtype, shape, group, received):
    add = FUSED.partition("%all-reduce-scatter")[0]
    text = entry(line).replace("ENTRY", f"{add}ENTRY")
    (one,) = transfers(text)
    assert one == Transfer(kind, dtype, shape, group, 1, "")
    assert one.received == received


def test_arrays_that_travel_together_count_each():
    line = (
        "%a = (bf16[8,3]{1,0}, f32[4]{0}) all-gather(%x, %y), replica_groups={{0,1}}, "
        'dimensions={0}, metadata={op_name="both"}'
    )
    assert transfers(entry(line)) == [
        Transfer("all-gather", "bf16", (8, 3), 2, 1, "both"),
        Transfer("all-gather", "f32", (4,), 2, 1, "both"),
    ]


def test_both_branches_and_an_asynchronous_call_are_read():
    text = entry(
        "%s = ((f32[2,3]), f32[4,3], u32[]) async-start(%x), calls=%wrapped",
        "%d = f32[4,3]{1,0} async-done(%s)",
        "%c = f32[4,3]{1,0} conditional(%p, %x, %x), branch_computations={%wrapped, %none}",
    )
    wrapped = (
        "%wrapped (x: f32[2,3]) -> f32[4,3] {\n"
        "  %g = f32[4,3]{1,0} all-gather(%x), replica_groups={{0,1}}, dimensions={0}\n}\n\n"
        "%none (x: f32[2,3]) -> f32[4,3] {\n  %z = f32[4,3]{1,0} constant({...})\n}\n\n"
    )
    assert len(transfers(text.replace("ENTRY", wrapped + "ENTRY"))) == 2


def test_what_is_no_program_or_sends_nothing_is_refused():
    with pytest.raises(ValueError, match="it has no ENTRY; give XLA's text of a whole module"):
        transfers("module @jit_f { func.func public @main() }")
    with pytest.raises(ValueError, match="sends nothing between devices: compile it for several"):
        transfers(entry("%a = f32[2,3]{1,0} add(%x, %x)"))
    with pytest.raises(ValueError, match="a: the reader knows no device groups like 'devices=all'"):
        transfers(entry("%a = f32[2,3]{1,0} all-reduce(%x), devices=all"))
    with pytest.raises(ValueError, match="the program's text is cut off"):
        transfers(entry("%a = f32[2,3]{1,0} all-reduce(%x, replica_groups={{0,1}}"))


def test_no_dump_and_two_dumps_are_refused(tmp_path: Path):
    with pytest.raises(ValueError) as error:
        dumped(tmp_path, "f")
    assert str(error.value) == (
        f"{tmp_path} holds 0 optimised programs of f: compile it once, with dump_options of an "
        "empty directory."
    )
    for number in range(2):
        (tmp_path / f"module_{number}.jit_f.cpu_after_optimizations.txt").write_text("")
    with pytest.raises(ValueError, match="holds 2 optimised programs of f"):
        dumped(tmp_path, "f")


def test_a_gather_that_xla_compiles_for_eight_devices(tmp_path: Path):
    """Four layers, each gathered once by a scan and multiplied."""
    mesh(fsdp=8)

    def f(x, weights):
        def layer(x, w):
            return jax.lax.dot(x, jax.reshard(w, spec(None, None))), None

        return jax.lax.scan(layer, x, weights)[0]

    def array(shape, *axes):
        sharding = jax.sharding.NamedSharding(jax.sharding.get_mesh(), spec(*axes))
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)

    x, w = array((8, 16), "batch", None), array((4, 16, 16), None, "embed", None)
    jax.jit(f).lower(x, w).compile(compiler_options=dump_options(tmp_path))
    (one,) = transfers(dumped(tmp_path, "f"))
    assert one[:5] == ("all-gather", "f32", (16, 16), 8, 4)
    assert one.received == 4 * 16 * 16 * 4 * 7 / 8
