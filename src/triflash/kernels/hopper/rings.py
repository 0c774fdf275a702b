"""Rings of buffers, and the mbarriers and named barriers that say who owns one. Called by every Hopper kernel."""

from .compat import gl, gluon, mbarrier, record


@record
class Ring:
    """STAGES buffers used in turn, for each block PARTS of them: whoever fills one waits for "empty", whoever reads it for "full".

    SIGNED: slots by division of signed numbers, as kernels compute them that were measured so; else see ``slot_of``.
    """

    full: object
    empty: object
    STAGES: gl.constexpr
    PARTS: gl.constexpr
    SIGNED: gl.constexpr

    @gluon.jit
    def slot(self, at, PART: gl.constexpr):
        """Which buffer a part of block ``at`` is in."""
        if self.SIGNED:
            slot = at % self.STAGES
        else:
            slot = slot_of(at, self.STAGES)
        if self.PARTS > 1:
            slot = slot * self.PARTS + PART
        return slot

    @gluon.jit
    def phase(self, at):
        """Which phase of that buffer's barriers is block ``at``'s."""
        if self.SIGNED:
            return (at // self.STAGES) & 1
        else:
            return phase_of(at, self.STAGES)

    @gluon.jit
    def wait(self, at, PART: gl.constexpr):
        mbarrier.wait(self.full.index(self.slot(at, PART)), self.phase(at))

    @gluon.jit
    def release(self, at, PART: gl.constexpr):
        mbarrier.arrive(self.empty.index(self.slot(at, PART)))

    @gluon.jit
    def acquire(self, at, PART: gl.constexpr):
        """Wait until the buffer may be filled; returns its barrier, which tells that it is full."""
        mbarrier.wait(self.empty.index(self.slot(at, PART)), self.phase(at) ^ 1)
        return self.full.index(self.slot(at, PART))


@gluon.jit
def ring(STAGES: gl.constexpr, PARTS: gl.constexpr, READERS: gl.constexpr, SIGNED: gl.constexpr):
    """A ring with barriers of its own, all of them empty; READERS partitions release each buffer."""
    full = barriers(STAGES * PARTS, 1)
    empty = barriers(STAGES * PARTS, READERS)
    return Ring(full, empty, STAGES, PARTS, SIGNED)


@gluon.constexpr_function
def _exponent(stages):
    """n, if ``stages`` is 2^n, else -1."""
    return stages.bit_length() - 1 if stages & (stages - 1) == 0 else -1


@gluon.jit
def slot_of(at, STAGES: gl.constexpr):
    """Which of STAGES buffers block ``at`` is in. On the critical path, so no division for powers of two."""
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
    """mbarriers in an allocation of their own: between two accesses to one allocation the compiler syncs all warps of a partition."""
    bars = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for n in gl.static_range(COUNT):
        mbarrier.init(bars.index(n), count=ARRIVALS)
    return bars


@gluon.constexpr_function
def _named_barrier(instruction, threads):
    return f"bar.{instruction} $1, {threads}; mov.u32 $0, 0;"


@gluon.jit
def bar_arrive(number, THREADS: gl.constexpr):
    """All threads of the partition arrive at named barrier ``number``, of the THREADS that arrive or sync there, and go on.

    Numbers 5 to 15: Triton uses those below. An arrival at an mbarrier makes the compiler sync the partition's warps twice, before it and
    before the next access to shared memory; this one does not.
    """
    gl.inline_asm_elementwise(_named_barrier("arrive", THREADS), "=r,r", [number], gl.int32, False, 1)


@gluon.jit
def bar_sync(number, THREADS: gl.constexpr):
    """As ``bar_arrive``, but wait until all have arrived."""
    gl.inline_asm_elementwise(_named_barrier("sync", THREADS), "=r,r", [number], gl.int32, False, 1)
