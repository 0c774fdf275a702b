"""Which tiles a program works through: called by every Hopper kernel with a persistent grid."""

from .compat import gl, gluon, record


@record
class Uniform:
    """A persistent grid that deals tiles out in waves: a (batch, head) pair has ``tiles_each`` tiles of TILE rows, all have ``tiles``.

    Pairs are cut into groups of ``l2_group`` whose shared operands (K and V, or Q and its gradients) fit in the L2 cache. Within a group,
    all pairs do one tile before any does the next. Under a band tiles differ in length (LONGEST: "last" or "first", else "none"), and every
    CTA should still get the same load: groups go from the longest tiles to the shortest and back in turn, the last one ending with the
    shortest. With ``serpentine`` = 1 every other wave is dealt to the CTAs from the other end. ``l2_order`` in ``plan/kernels`` chooses
    both. BATCH_FASTEST: neighbours differ in the batch, not the head, and share a bias that broadcasts over the batch.
    """

    tiles_each: object
    tiles: object
    batch: object
    heads: object
    l2_group: object
    serpentine: object
    TILE: gl.constexpr
    LONGEST: gl.constexpr
    BATCH_FASTEST: gl.constexpr

    @gluon.jit
    def waves(self):
        """How many tiles this program works through."""
        programs = gl.num_programs(0)
        waves = self.tiles // programs
        return waves + (_place(waves, self.serpentine) < self.tiles % programs).to(gl.int32)

    @gluon.jit
    def locate(self, wave):
        """(first row, head, batch) of this program's tile of a wave."""
        index = wave * gl.num_programs(0) + _place(wave, self.serpentine)
        number = index // (self.l2_group * self.tiles_each)
        rest = index - number * (self.l2_group * self.tiles_each)
        size = min(self.l2_group, self.batch * self.heads - number * self.l2_group)
        tile = rest // size
        pair = number * self.l2_group + rest % size
        if self.LONGEST != "none":
            remaining = (self.batch * self.heads + self.l2_group - 1) // self.l2_group - 1 - number
            if self.LONGEST == "last":
                tile = gl.where((remaining & 1) == 0, self.tiles_each - 1 - tile, tile)
            else:
                tile = gl.where((remaining & 1) == 0, tile, self.tiles_each - 1 - tile)
        if self.BATCH_FASTEST:
            head = pair // self.batch
            b = pair % self.batch
        else:
            head = pair % self.heads
            b = pair // self.heads
        return tile * self.TILE, head, b


@gluon.jit
def _place(wave, serpentine):
    return gl.where((wave & serpentine) == 0, gl.program_id(0), gl.num_programs(0) - 1 - gl.program_id(0))
