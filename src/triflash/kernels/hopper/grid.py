"""Which tiles a program of a persistent grid works through, and small things that all Hopper kernels share."""

from .compat import gl, gluon, mbarrier
from .edges import FLAGS


@gluon.constexpr_function
def accumulator(columns):
    """How a warpgroup holds the result of a product: 64 rows, 16 a warp."""
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, columns, 16])


@gluon.constexpr_function
def stacked(count, shape):
    """The shape of ``count`` blocks."""
    return [count, *shape]


@gluon.constexpr_function
def _exponent(stages):
    """n, if ``stages`` is 2^n, else -1."""
    return stages.bit_length() - 1 if stages & (stages - 1) == 0 else -1


@gluon.jit
def slot_of(at, STAGES: gl.constexpr):
    """Which of STAGES buffers that are used in turn block ``at`` is in. In as few steps as can be: who asks waits for the answer."""
    BITS: gl.constexpr = _exponent(STAGES)
    if BITS >= 0:
        return at & (STAGES - 1)
    else:
        return gl.cast(gl.cast(at, gl.uint32) % STAGES, gl.int32)


@gluon.jit
def phase_of(at, STAGES: gl.constexpr):
    """Which phase of that buffer's barriers is block ``at``'s: 0 or 1."""
    BITS: gl.constexpr = _exponent(STAGES)
    if BITS >= 0:
        return (at >> BITS) & 1
    else:
        return gl.cast(gl.cast(at, gl.uint32) // STAGES, gl.int32) & 1


@gluon.jit
def barriers(COUNT: gl.constexpr, ARRIVALS: gl.constexpr):
    """So many barriers, in shared memory of their own: between two accesses to one allocation, the compiler lets all warps of a partition
    meet, and barriers of different names would meet that way for nothing.
    """
    bars = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for n in gl.static_range(COUNT):
        mbarrier.init(bars.index(n), count=ARRIVALS)
    return bars


@gluon.constexpr_function
def _at_processor(instruction, threads):
    return f"bar.{instruction} $1, {threads}; mov.u32 $0, 0;"


@gluon.jit
def signal(number, THREADS: gl.constexpr):
    """All threads of the partition arrive at barrier ``number`` of the processor, of the THREADS that arrive or meet there, and go on.

    Numbers 5 to 15: Triton uses those below. An arrival at a barrier in shared memory costs two meetings of the partition's warps, before
    it and before the next access to shared memory; this one costs none.
    """
    gl.inline_asm_elementwise(_at_processor("arrive", THREADS), "=r,r", [number], gl.int32, False, 1)


@gluon.jit
def meet(number, THREADS: gl.constexpr):
    """As ``signal``, but wait there until all have arrived."""
    gl.inline_asm_elementwise(_at_processor("sync", THREADS), "=r,r", [number], gl.int32, False, 1)


@gluon.constexpr_function
def _selection(hidden):
    return "{ .reg .pred p; setp.le.s32 p, $2, $3; selp.f32 $0, $1, " + hidden + ", p; }"


@gluon.jit
def keep_up_to(x, at, last, HIDDEN: gl.constexpr):
    """x, float32, where ``at <= last``, else HIDDEN, a float32 as PTX writes it; numbers of 32 bits that broadcast to x.

    In assembly, because of a comparison of whole tiles LLVM makes a vector of bits, packed and unpacked: twice the instructions.
    """
    at, x = gl.broadcast(at, x)
    last, x = gl.broadcast(last, x)
    return gl.inline_asm_elementwise(_selection(HIDDEN), "=f,f,r,r", [x, at, last], gl.float32, True, 1)


@gluon.jit
def mildest(mild):
    """1 if all statistics are mild, else 0: what ``prepare`` found."""
    EACH_WARP: gl.constexpr = gl.BlockedLayout([FLAGS // 32], [32], [4], [0])  # so that they need not meet
    return gl.min(gl.load(mild + gl.arange(0, FLAGS, EACH_WARP)), 0)


@gluon.jit
def share(tiles, snake):
    """How many tiles this program works through: the grid deals them out in waves."""
    programs = gl.num_programs(0)
    waves = tiles // programs
    return waves + (_place(waves, snake) < tiles % programs).to(gl.int32)


@gluon.jit
def _place(wave, snake):
    return gl.where((wave & snake) == 0, gl.program_id(0), gl.num_programs(0) - 1 - gl.program_id(0))


@gluon.jit
def locate(
    wave, tiles, batch, heads, section, snake, BATCH_FASTEST: gl.constexpr, TILE: gl.constexpr, LONGEST: gl.constexpr,
):  # fmt: skip
    """(first row, head, batch) of this program's tile of a wave; a (batch, head) pair has ``tiles`` tiles of TILE rows.

    Pairs of batch and head are cut into sections whose shared operands (keys and values, or queries) fit in the L2 cache; within a section
    all pairs do one tile before any does the next. Under a causal mask tiles differ in length (LONGEST: "last" or "first", else "none"),
    and what every program gets must still add up to the same: sections go from the longest tiles to the shortest and back in turn, the last
    one ending with the shortest; with ``snake`` = 1 every other wave is dealt to the programs from the other end. ``plan/hopper.py``
    chooses. BATCH_FASTEST: neighbours differ in the batch, not the head, and so share a bias that broadcasts over the batch.
    """
    index = wave * gl.num_programs(0) + _place(wave, snake)
    number = index // (section * tiles)
    rest = index - number * (section * tiles)
    size = min(section, batch * heads - number * section)
    tile = rest // size
    pair = number * section + rest % size
    if LONGEST != "none":
        remaining = (batch * heads + section - 1) // section - 1 - number
        if LONGEST == "last":
            tile = gl.where((remaining & 1) == 0, tiles - 1 - tile, tile)
        else:
            tile = gl.where((remaining & 1) == 0, tile, tiles - 1 - tile)
    if BATCH_FASTEST:
        head = pair // batch
        b = pair % batch
    else:
        head = pair % heads
        b = pair // heads
    return tile * TILE, head, b
