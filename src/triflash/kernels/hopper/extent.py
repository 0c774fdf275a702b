"""Which queries and keys a tile's sequence has. Called by every Hopper kernel that owns tiles of a sequence, once a tile."""

from .compat import gluon, record
from .features import visible_keys


@record
class Extent:
    """queries: of the sequence. keys: the visible ones, of ``stored``."""

    queries: object
    keys: object
    stored: object

    @gluon.jit
    def diagonal(self):
        """The key at distance 0 from query 0, in bands and ALiBi: the last query meets the last stored key."""
        return self.stored - self.queries


@gluon.jit
def extent_of(b, M, N, lengths):
    """The extent of batch entry b with M queries and N keys, of which ``lengths`` may hide some."""
    return Extent(M, visible_keys(lengths, b, N), N)


@gluon.jit
def outer_at(b, batch_inner, head, on):
    """Where a bias or mask lies along (outer batch, inner batch, head); ``on`` is 0 for those that it broadcasts over."""
    return b // batch_inner * on[0], b % batch_inner * on[1], head * on[2]
