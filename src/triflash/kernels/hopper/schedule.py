"""Which tiles a program works through: called by every Hopper kernel with a persistent grid."""

from .compat import gl, gluon, record


@record
class Uniform:
    """A persistent grid that deals tiles out in waves: a (batch, head) pair has ``tiles_each`` tiles of TILE rows, all have ``tiles``.

    Pairs of batch and head are cut into sections whose shared operands (keys and values, or queries) fit in the L2 cache; within a section
    all pairs do one tile before any does the next. Under a causal mask tiles differ in length (LONGEST: "last" or "first", else "none"),
    and what every program gets must still add up to the same: sections go from the longest tiles to the shortest and back in turn, the last
    one ending with the shortest; with ``snake`` = 1 every other wave is dealt to the programs from the other end. ``plan/hopper.py``
    chooses. BATCH_FASTEST: neighbours differ in the batch, not the head, and so share a bias that broadcasts over the batch.
    """

    tiles_each: object
    tiles: object
    batch: object
    heads: object
    section: object
    snake: object
    TILE: gl.constexpr
    LONGEST: gl.constexpr
    BATCH_FASTEST: gl.constexpr

    @gluon.jit
    def waves(self):
        """How many tiles this program works through."""
        programs = gl.num_programs(0)
        waves = self.tiles // programs
        return waves + (_place(waves, self.snake) < self.tiles % programs).to(gl.int32)

    @gluon.jit
    def locate(self, wave):
        """(first row, head, batch) of this program's tile of a wave."""
        index = wave * gl.num_programs(0) + _place(wave, self.snake)
        number = index // (self.section * self.tiles_each)
        rest = index - number * (self.section * self.tiles_each)
        size = min(self.section, self.batch * self.heads - number * self.section)
        tile = rest // size
        pair = number * self.section + rest % size
        if self.LONGEST != "none":
            remaining = (self.batch * self.heads + self.section - 1) // self.section - 1 - number
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
def _place(wave, snake):
    return gl.where((wave & snake) == 0, gl.program_id(0), gl.num_programs(0) - 1 - gl.program_id(0))
