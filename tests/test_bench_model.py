"""The model of bench.model on machine code that is small enough to count by hand."""

import json
import shutil
import subprocess

import pytest

pytest.importorskip("triton")

from bench import model, sass  # noqa: E402
from bench.bench_attention import Shape  # noqa: E402


def listing(code: str, name: str = "kernel", table: bytes = b"") -> str:
    """As nvdisasm -hex prints it. A line: instruction ; stall, waited for, set until done."""
    lines = [f'\t.section\t.text.{name},"ax",@progbits', f".text.{name}:"]
    at = 0
    for line in code.strip().splitlines():
        text, _, scheduled = line.partition(";")
        if text.strip().endswith(":"):
            lines.append(text.strip())
            continue
        stall, waits, done = [*map(int, scheduled.split()), *(1, 0, 7)[len(scheduled.split()) :]]
        control = (stall | done << 5 | 7 << 8 | waits << 11) << 41
        lines.append(f"        /*{at:04x}*/    {text.strip()} ;   /* 0x{0:016x} */")
        lines.append(f"                          /* 0x{control:016x} */")
        at += 16
    if table:
        lines.append(f'\t.section\t.nv.constant2.{name},"a",@progbits')
        lines.append("        /*0000*/ \t.byte\t" + ", ".join(f"0x{x:02x}" for x in table))
    return "\n".join(lines) + "\n"


def parsed(code: str, **options) -> sass.Function:
    return sass.parse(listing(code, **options))["kernel"]


TILE = """
    MOV R1, 0x4
.L_x_1:
    DEPBAR.LE SB0, 0x0
    @P1 BRA `(.L_x_3)
    IMAD R3, R4, R5, R6
.L_x_2:
    BAR.SYNC.DEFER_BLOCKING 0x0
    LDGSTS.E.BYPASS.128 [R66], desc[UR54][R8.64], P3
    LDGDEPBAR
    LDSM.16.M88.4 R24, [R73+UR4]
    HMMA.16816.F32.BF16 R32, R32, R24, RZ
    FFMA R3, R4, R5, R6
    MUFU.EX2 R7, R7
    IADD3 R1, R1, -0x1, RZ
    @!UPT UIADD3 URZ, URZ, URZ, URZ
    ISETP.NE.AND P0, PT, R1, RZ, PT
    @P0 BRA `(.L_x_1)
    EXIT
.L_x_3:
    FADD R3, R3, R3
    BRA `(.L_x_2)
"""


def test_the_loop_over_tiles_is_found():
    """Code out of line leads back, too, but only what a label leads to is a loop."""
    function = parsed(TILE)
    [loop] = function.loops()
    assert (loop.begin, loop.end, loop.depth) == (1, 14, 0)
    assert function.code[loop.begin].op == "DEPBAR.LE"
    within = TILE.replace("    MOV R1, 0x4", ".L_x_0:\n    MOV R1, 0x4").replace(
        "    EXIT", "    @P5 BRA `(.L_x_0)\n    EXIT"
    )
    assert [x.depth for x in parsed(within).loops()] == [1]
    for needed in ("HMMA.16816.F32.BF16 R32, R32, R24, RZ", "LDGSTS.E.BYPASS.128 [R66], desc"):
        assert not parsed(TILE.replace(needed, "NOP, desc")).loops()


def test_instructions_are_counted_by_pipe():
    function = parsed(TILE)
    trace = function.code[1:15]
    pipes = model.by_pipe(trace, warps=8)
    assert pipes == pytest.approx({
        "issue": 14 * 8 / 4,
        "ALU": 2 * 8 * 32 / 64,  # IADD3, ISETP; what fills a slot costs only the slot
        "IMAD": 1 * 8 * 32 / 64,
        "FMA": 2 * 8 * 32 / 128,  # FFMA, and what IMAD takes
        "XU": 8 * 32 / 16,
        "shared": 2 * 8 * 32 * 16 / 128,  # LDGSTS, LDSM
        "mma.sync": 8 * 16 * 8 * 16 / (0.62 * 2048),
        "wgmma": 0,
    })  # fmt: skip
    [warpgroup] = parsed("HGMMA.64x64x16.F32.BF16 R24, R72, gdesc[UR12].tnspB, R24").code
    assert model.cost(warpgroup, 8) == ("wgmma", 2 * 64 * 64 * 16 / 2048)


def test_a_sum_of_all_bounds():
    """The ceiling is the busiest pipe's, and latency binds where it takes longer than that."""
    pipes = dict.fromkeys(model.PIPES, 10.0) | {"ALU": 100.0}
    found = model.rated(pipes, simulated=250, blocks=2, hbm=50, memory=50)
    assert (found["pipe"], found["ceiling"]) == ("ALU", 0.5)
    assert (found["binds"], found["cycles"], found["rate"]) == ("latency", 250, 0.4)
    assert model.rated(pipes, 200, 2, 50, 50)["binds"] == "ALU"
    full = model.rated(pipes, 200, 2, 400, 400)
    assert (full["binds"], full["ceiling"], full["rate"], full["cycles"]) == ("HBM", 4, 1, 800)


@pytest.mark.parametrize(
    "registers,shared,warps,blocks",
    [(186, 49_280, 8, 1), (167, 71_168, 4, 3), (32, 0, 4, 16), (64, 116_000, 4, 1), (32, 0, 1, 32)],
)
def test_occupancy(registers, shared, warps, blocks):
    assert model.occupancy(registers, shared, warps) == blocks


def test_time_of_a_lone_warp():
    far = model.cycles("DRAM")
    # A load, and what needs it 4 cycles on: latency, and the stalls of both.
    loads = parsed("LDG.E.U16 R2, desc[UR4][R4.64] ; 4 0 0\nIADD3 R2, R2, R2, RZ ; 5 1").code
    cycles, copied = model.simulate(loads, warps=1, blocks=1)
    assert cycles == pytest.approx(far + 5 + 32 * 4 / 128, abs=2) and not copied
    tables = parsed("LDG.E R2, desc[UR4][R4.64] ; 4 0 0\nIADD3 R2, R2, R2, RZ ; 5 1").code
    assert model.simulate(tables, 1, 1)[0] == pytest.approx(cycles - far + model.cycles("L2"))
    # Two blocks cover for one another.
    assert model.simulate(loads, 1, 2)[0] == pytest.approx(cycles, abs=2)


def test_copies_that_are_awaited_at_once_cover_nothing():
    far, long = model.cycles("DRAM"), 700

    def tile(ahead: int) -> list:
        work = "\n".join(["FFMA R3, R3, R4, R5 ; 14"] * (long // 14))
        return parsed(
            f"DEPBAR.LE SB0, {ahead:#x}\n{work}\nLDGSTS.E.128 [R6], desc[UR4][R8.64]\nLDGDEPBAR"
        ).code

    at_once, one = model.simulate(tile(0), 1, 1)
    a_tile_ahead, two = model.simulate(tile(1), 1, 1)
    assert at_once == pytest.approx(long + far, abs=10)
    assert a_tile_ahead == pytest.approx(long, abs=10)
    assert (one, two) == (16, 32)


def test_pipes_bound_what_is_played():
    busy = parsed("\n".join(f"IADD3 R{i}, R40, R41, RZ" for i in range(32))).code
    for warps, blocks in ((4, 1), (8, 2)):
        bound = blocks * model.by_pipe(busy, warps)["ALU"]
        assert model.simulate(busy, warps, blocks)[0] == pytest.approx(bound, rel=0.05)


LANE = """
    S2R R0, SR_TID.X
    LDC R2, c[0x0][0x210]
    LDC R6, c[0x0][0x214]
    I2F.U32.RP R3, R2
    MUFU.RCP R3, R3
    VIADD R3, R3, 0xffffffe
    F2I.FTZ.U32.TRUNC.NTZ R3, R3
    IMAD.MOV R4, RZ, RZ, -R3
    IMAD R4, R4, R2, RZ
    IMAD.MOV.U32 R8, RZ, RZ, RZ
    IMAD.MOV.U32 R9, RZ, RZ, R3
    IMAD.HI.U32 R3, R3, R4, R8
    IMAD.HI.U32 R5, R3, R6, RZ
    IMAD.MOV R7, RZ, RZ, -R5
    IMAD R7, R2, R7, R6
    ISETP.GE.U32.AND P0, PT, R7, R2, PT
    @P0 IMAD.IADD R7, R7, 0x1, -R2
    @P0 VIADD R5, R5, 0x1
    ISETP.GE.U32.AND P1, PT, R7, R2, PT
    @P1 VIADD R5, R5, 0x1
    ISETP.NE.AND P2, PT, R5, 0x6, PT
    @P2 BRA `(.L_x_9)
    LDS R10, [R11]
    ISETP.EQ.AND P3, PT, R10, RZ, PT
    @P3 BRA `(.L_x_9)
    SHF.L.U32 R5, R5, 0x1, RZ
.L_x_4:
    IADD3 R5, R5, -0x1, RZ
    ISETP.GT.AND P0, PT, R5, RZ, PT
    @P0 BRA `(.L_x_4)
    LDC R12, c[0x2][0x4]
    BRX R12 -0x1f0 (*"BRANCH_TARGETS .L_x_9,.L_x_8"*)
.L_x_9:
    NOP
.L_x_8:
    EXIT
"""


@pytest.mark.parametrize("divisor,dividend", [(16, 100), (7, 45), (1, 6)])
def test_a_lane_follows_what_parameters_decide(divisor, dividend):
    """100 / 16 = 6 opens the way; what shared memory holds does not close it; 12 rounds."""
    table = (0).to_bytes(4, "little") + (0x200).to_bytes(4, "little")
    function = parsed(LANE, table=table)
    parameters = b"".join(x.to_bytes(4, "little") for x in (divisor, dividend))
    ops = [function.code[i].op for i in sass.Lane(function, parameters, lambda *_: None).run(999)]
    assert ops.count("LDS") == 1 and ops[-1] == "EXIT" and "NOP" not in ops
    assert ops.count("IADD3") == 12
    other = parameters[:4] + (dividend + divisor).to_bytes(4, "little")
    away = [function.code[i].op for i in sass.Lane(function, other, lambda *_: None).run(999)]
    assert away[-2:] == ["NOP", "EXIT"] and "LDS" not in away


@pytest.mark.parametrize("kind,taken", [("ALL", True), ("ANY", False)])
def test_a_vote_of_all_is_unanimous(kind, taken):
    """Where shared memory decides, only that branch is taken: peaks stay."""
    function = parsed(f"""
        LDS R4, [R5]
        ISETP.EQ.AND P0, PT, R4, RZ, PT
        VOTE.{kind} P1, P0
        @P1 BRA `(.L_x_1)
        NOP
    .L_x_1:
        EXIT
    """)
    ops = [function.code[i].op for i in sass.Lane(function, b"", lambda *_: None).run(99)]
    assert ("NOP" not in ops) == taken


def test_a_jump_that_nothing_decides_is_an_error():
    function = parsed('LDS R4, [R5]\nBRX R4 -0x20 (*"BRANCH_TARGETS .L_x_1"*)\n.L_x_1:\nEXIT')
    with pytest.raises(ValueError, match="0x10 depends on what is not known"):
        sass.Lane(function, b"", lambda *_: None).run(9)


def figures(**changes) -> dict:
    return {
        "impl": "triton", "format": "none", "d": 128, "tile": "few", "rows": 16, "slots": 32,
        "blocks": 1, "cycles": 2000.0, "ceiling": 1.0, "rate": 1.0, "bytes in flight": 2**15,
    } | changes  # fmt: skip


def test_time_of_a_shape():
    """Nothing shared: 128 tiles of 64 rows and 8 heads, over 132 places."""
    of = {"few": figures(), "many": figures(tile="many", rows=64)}
    shape = model.SHAPES[0]
    least = 64 * 8 * 128 * 2000 / 132 / model.cycles("clock")
    assert least < model.seconds(shape, of) < 1.08 * least
    of["few"]["cycles"] = 1.0
    assert model.seconds(shape, of) == model.floor(shape, "none")
    # Shared slots are the other tile's.
    shared = Shape(64, 8192, 256, *model.LLAMA)
    before = model.seconds(shared, of)
    of["many"]["cycles"] = 9000.0
    once = model.seconds(shared, of)
    assert once > 2 * before
    of["many"]["rows"] = 32  # half of an item's rows at a time
    assert model.seconds(shared, of) > 1.8 * once


def test_kernels_for_few_and_many_rows_follow_one_another():
    of = {"few": figures(impl="cuda", rows=8), "many": figures(impl="cuda", tile="many", rows=64)}
    own, shared = model.SHAPES
    alone = model.seconds(own, of)
    of["many"]["cycles"] = 9000.0
    assert model.seconds(own, of) == alone
    both = model.seconds(shared, of)
    of["many"]["blocks"] = 2  # of these there are more places, of the others no more
    assert model.seconds(shared, of) < both


def test_a_measured_time_stands_beside_it(tmp_path):
    rows = {"kvtools": {"ms": 0.5}, "kvtools int4, CUDA C++": {"ms": 0.2}, "sdpa": {"ms": 1.0}}
    cells = {"llama 64 x 4096": rows, "llama 64 x 8192 + 256": {"kvtools": {"failed": "died"}}}
    other = {"device": "H100", "parts": {"attention": {"cells": cells}}}
    (tmp_path / "h100.json").write_text(json.dumps(other))
    (tmp_path / "cpu.json").write_text(json.dumps({"cells": {}}))
    own, shared = model.SHAPES
    assert model.measured(own, "none", "triton", tmp_path) == 500
    assert model.measured(own, "int4", "cuda", tmp_path) == 200
    assert model.measured(own, "int4", "triton", tmp_path) is None
    assert model.measured(shared, "none", "triton", tmp_path) is None


def test_targets_see_a_slow_kernel():
    kernels = [figures(format=x) for x in model.SHOWN]
    times = [{"impl": "triton", "shared": p, "format": x, "us": us}
             for p, x, us in ((0, "none", 400), (0, "int4", 100), (8192, "none", 50),
                              (8192, "int4", 30))]  # fmt: skip
    good = model.judge(kernels, times)
    assert all(x["ok"] for x in good) and len(good) == 12
    kernels[0]["ceiling"], kernels[3]["rate"] = 0.94, 0.5
    kernels[0]["bytes in flight"], times[1]["us"], times[3]["us"] = 2**14, 200, 41
    assert [x["name"].partition(",")[0] for x in model.judge(kernels, times) if not x["ok"]]
    assert sum(not x["ok"] for x in model.judge(kernels, times)) == 5


def test_a_kernel_that_nvcc_compiled(tmp_path):
    if not shutil.which("nvcc"):
        pytest.skip("nvcc is not here")
    (tmp_path / "tiny.cu").write_text("""
        extern "C" __global__ void tiny(const unsigned* x, float* y, int n) {
          float c[4] = {};
        #pragma unroll 1
          for (int i = 0; i < n; ++i)
            for (int j = 0; j < 2; ++j) {
              const unsigned a = x[(i * 2 + j) * 32 + threadIdx.x];
              asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%4,%4,%4}, "
                  "{%4,%4}, {%0,%1,%2,%3};"
                  : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a));
            }
          for (int m = 0; m < 4; ++m) y[4 * threadIdx.x + m] = c[m];
        }""")
    cubin = tmp_path / "tiny.cubin"
    subprocess.run(
        ["nvcc", "-cubin", "-arch=sm_90a", tmp_path / "tiny.cu", "-o", cubin], check=True
    )
    function = sass.disassemble(cubin)["tiny"]
    [loop] = function.loops()
    names = [x.name for x in function.code[loop.begin : loop.end + 1]]
    assert names.count("HMMA") == 2 and names.count("LDG") == 2
    # Five rounds of the loop, by the number that is a parameter.
    parameters = bytes(16) + (5).to_bytes(4, "little")
    trace = sass.Lane(function, parameters, lambda *_: None).run(9999)
    assert sum(function.code[i].name == "HMMA" for i in trace) == 10
