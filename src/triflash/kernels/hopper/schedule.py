"""Which tiles a program works through: called by every Hopper kernel with a persistent grid."""

from .compat import gl, gluon, record
from .extent import BEYOND, ENTRY


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
        head, b = _head_and_batch(self, pair)
        return tile * self.TILE, head, b


@record
class Pairs:
    """A persistent grid that deals out (batch, head) pairs: a program has all ``tiles_each`` tiles of TILE rows of a pair in a row."""

    tiles_each: object
    batch: object
    heads: object
    TILE: gl.constexpr
    BATCH_FASTEST: gl.constexpr

    @gluon.jit
    def waves(self):
        """How many tiles this program works through."""
        pairs = self.batch * self.heads
        programs = gl.num_programs(0)
        return (pairs // programs + (gl.program_id(0) < pairs % programs).to(gl.int32)) * self.tiles_each

    @gluon.jit
    def locate(self, wave):
        """(first row, head, batch) of this program's tile of a wave."""
        pair = wave // self.tiles_each * gl.num_programs(0) + gl.program_id(0)
        head, b = _head_and_batch(self, pair)
        return wave % self.tiles_each * self.TILE, head, b

    @gluon.jit
    def begins_pair(self, wave):
        """Whether that tile is its pair's first."""
        return wave % self.tiles_each == 0

    @gluon.jit
    def ends_pair(self, wave):
        """Whether that tile is its pair's last."""
        return wave % self.tiles_each == self.tiles_each - 1


@record
class Listed:
    """A persistent grid that deals out the tiles of a table (``listed.py``): ``entries`` have ENTRY numbers each, there are ``count`` for
    each of ``heads``. A head's tiles are dealt out before the next head's, in turn from the shortest to the longest and back, the last
    head's so that they end with the shortest, and every other wave to the programs from the other end. LEAST: tiles that a program has even
    where there are none for it; such a one has no rows.
    """

    entries: object
    count: object
    heads: object
    LEAST: gl.constexpr

    @gluon.jit
    def waves(self):
        """How many tiles this program works through."""
        programs = gl.num_programs(0)
        tiles = self.count * self.heads
        waves = tiles // programs
        return max(waves + (_place(waves, 1) < tiles % programs).to(gl.int32), self.LEAST)

    @gluon.jit
    def locate(self, wave):
        """(first row, head, number in the table) of this program's tile of a wave."""
        index = wave * gl.num_programs(0) + _place(wave, 1)
        exists = index < self.count * self.heads
        head = gl.where(exists, index // max(self.count, 1), 0)
        at = index - head * self.count
        at = gl.where(((self.heads - 1 - head) & 1) == 0, at, self.count - 1 - at)
        at = gl.where(exists, at, 0)
        return gl.where(exists, gl.load(self.entries + at * ENTRY), BEYOND), head, at


@gluon.jit
def _place(wave, serpentine):
    return gl.where((wave & serpentine) == 0, gl.program_id(0), gl.num_programs(0) - 1 - gl.program_id(0))


@gluon.jit
def _head_and_batch(grid, pair):
    """Of the number of a (batch, head) pair."""
    if grid.BATCH_FASTEST:
        return pair // grid.batch, pair % grid.batch
    else:
        return pair % grid.heads, pair // grid.heads
