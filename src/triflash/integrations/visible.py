"""What a Hugging Face mask says, without a (M, N) tensor wherever a band and a row of keys can say it. Imports transformers when called.

transformers builds one mask a forward pass and kind of layer, and hands it to every layer as ``attention_mask``. The mask function here
returns a :class:`Visible`, or the 4-dim bool mask where that is not enough.
"""

from __future__ import annotations

import functools
import inspect
import re
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..errors import bad_value
from ..plan.device import facts_of
from .documents import chunk_starts, offsets_of, parts_of

__all__ = ["Visible", "lean_mask", "own_attention", "refuse_unrouted"]


class Visible:
    """Which keys each query sees: a band around the diagonal, and keys that nobody sees.

    Query i of M sees key j of N if ``i' − left <= j <= i' + right``, with ``i' = i + N − M``, or ``i' = i`` if ``top_left``, or
    ``i' = i + diagonal`` if there is one, a number or integers ``(B,)``, as a static cache has it; None leaves a side open. keys: bool
    ``(B, 1, 1, N)``, True is visible; or lengths, starts: integers ``(B,)``, keys from that number on, and before it, are hidden. bias:
    floats that a model added to its mask, as BEiT does, with their gradient; or None. offsets ``(n + 1,)``, used ``(n,)``: the B·N rows,
    one behind the other, are n blocks, of which each query sees its own alone, and of that the first ``used`` keys.

    It stands where models expect a mask, so it answers for its shape, moves between devices, takes a bias, and says what is wrong where a
    model wants more.
    """

    ndim = 4

    def __init__(
        self,
        shape: tuple[int, int, int, int],
        left: int | None,
        right: int | None,
        top_left: bool = False,
        keys: Tensor | None = None,
        lengths: Tensor | None = None,
        bias: Tensor | None = None,
        starts: Tensor | None = None,
        diagonal: int | Tensor | None = None,
        offsets: Tensor | None = None,
        used: Tensor | None = None,
    ):
        self.shape, self.left, self.right, self.top_left = shape, left, right, top_left
        self.keys, self.lengths, self.bias, self.starts, self.diagonal = keys, lengths, bias, starts, diagonal
        self.offsets, self.used = offsets, used

    def to(self, *args: Any, **options: Any) -> Visible:
        """Itself, with its tensors where they are wanted. Dtypes stay."""
        device = options.get("device", next((x for x in args if isinstance(x, (str, int, torch.device))), None))
        moved = (x.to(device) if isinstance(x, Tensor) and device is not None else x for x in self._tensors())
        return self._with(*moved)

    def contiguous(self) -> Visible:
        """Itself: generation with static caches asks its masks for this."""
        return self

    def _tensors(self) -> tuple[Any, ...]:
        return self.keys, self.lengths, self.bias, self.starts, self.diagonal, self.offsets, self.used

    def _with(self, *tensors: Any) -> Visible:
        return Visible(self.shape, self.left, self.right, self.top_left, *tensors)

    def __add__(self, bias: Any) -> Visible:
        if not isinstance(bias, Tensor) or not bias.is_floating_point():
            return self._no_tensor()
        keys, lengths, own, *others = self._tensors()
        return self._with(keys, lengths, bias if own is None else own + bias, *others)

    __radd__ = __add__

    def options(self) -> dict[str, Any]:
        """Keywords of ``triflash.attention``."""
        causal: bool | str = "top_left" if self.top_left else self.right == 0
        window = None if self.left is None and not self.right else (self.left, self.right)
        places = {"key_lengths": self.lengths, "key_starts": self.starts, "diagonal": self.diagonal}
        return {"causal": causal, "window": window, "mask": self.keys, **places}

    def whole(self) -> Tensor:
        """Of blocks the bool mask ``(B, 1, M, N)``, for what is added to scores by its place in the row."""
        assert self.offsets is not None
        B, _, M, N = self.shape
        rows = torch.arange(B * N, device=self.offsets.device)
        block = torch.searchsorted(self.offsets, rows, right=True) - 1
        shown = torch.ones_like(rows, dtype=torch.bool) if self.used is None else rows - self.offsets[block] < self.used[block]
        block, shown = block.view(B, N), shown.view(B, 1, 1, N)
        behind = rows[:M, None] - rows[None, :N]
        if self.left is not None:
            shown = shown & (behind <= self.left)
        return (block[:, None, :, None] == block[:, None, None, :]) & shown & (behind >= 0)

    @staticmethod
    def _no_tensor(*args: Any, **options: Any) -> Any:
        raise TypeError(
            "attention_mask: this model computes with its mask, and triflash made none of (M, N); "
            "call triflash.integrations.transformers.register(lean=False), which always makes one"
        )

    __getitem__ = __and__ = __rand__ = __invert__ = __mul__ = __rmul__ = __lt__ = __gt__ = _no_tensor

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in (torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__) and len(args) == 2 and not kwargs:
            first, second = args
            return first.__add__(second) if isinstance(first, Visible) else second.__add__(first)
        return cls._no_tensor()

    def __repr__(self) -> str:
        named = (("keys", self.keys), ("lengths", self.lengths), ("starts", self.starts), ("blocks", self.offsets))
        hidden = " and ".join(name for name, x in named if x is not None) or "none"
        corner = "top_left" if self.top_left else "bottom_right" if self.diagonal is None else "diagonal"
        return f"Visible(shape={tuple(self.shape)}, left={self.left}, right={self.right}, align={corner!r}, hidden={hidden})"


def lean_mask(
    batch_size: int,
    q_length: int | None = None,
    kv_length: int = 0,
    q_offset: int | Tensor = 0,
    kv_offset: int | Tensor = 0,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: Tensor | Visible | None = None,
    *,
    cache_position: Tensor | None = None,
    lean: bool = True,
    checked: bool = True,
    **options: Any,
) -> Tensor | Visible:
    """A mask function for transformers' ``AttentionMaskInterface``: :class:`Visible` if that says all, else bool ``(B, 1, M, N)``.

    Args:
        batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask: as transformers' own mask functions take them.
            attention_mask: bool ``(B, keys so far)``, False is padding.
        cache_position: positions of the queries ``(M,)``, which older versions pass in place of q_length and q_offset.
        lean: False always makes the 4-dim mask.
        checked: raise for models that do not hand masks to the attention interface.
        options: the rest of what transformers passes; ``allow_is_causal_skip`` and ``allow_is_bidirectional_skip`` say that nothing but
            mask_function and padding decides.
    """
    config = options.get("config")
    if checked and config is not None:
        refuse_unrouted(type(config))
    if isinstance(attention_mask, Visible):  # a model inside a model was given the outer one's
        return attention_mask
    if attention_mask is not None and attention_mask.dim() != 2:
        hint = "mask.bool()[:, None] says which keys each query sees" if attention_mask.dim() == 3 else ""
        raise bad_value("attention_mask", "(B, keys), or 4 dims (B, H or 1, queries, keys)", tuple(attention_mask.shape), hint)
    if cache_position is not None:
        q_length, q_offset = cache_position.shape[0], _first(cache_position)
    assert q_length is not None
    shape = (batch_size, 1, q_length, kv_length)
    band = _band(shape, q_offset, kv_offset, mask_function, options) if lean else None
    if band is not None:
        left, right, top_left, diagonal = band
        keys, lengths, starts = _padding(attention_mask, kv_length, kv_offset)
        return Visible(shape, left, right, top_left, keys, lengths, None, starts, diagonal)
    if lean and _in_static_cache(shape, q_offset, kv_offset, mask_function, options):
        # The cache adds to its own count in place before anything attends: a clone is a tensor of its own.
        return Visible(shape, None, 0, keys=_hidden_keys(attention_mask, kv_length), diagonal=q_offset.clone().expand(batch_size))  # type: ignore[union-attr]
    if lean and (blocks := _blocks(shape, q_offset, kv_offset, mask_function, attention_mask, options)) is not None:
        return blocks
    from transformers import masking_utils

    options |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    positions = {"q_length": q_length, "q_offset": q_offset} if cache_position is None else {"cache_position": cache_position}
    if mask_function is None:
        mask_function = masking_utils.causal_mask_function
    return masking_utils.sdpa_mask(
        batch_size=batch_size, kv_length=kv_length, kv_offset=kv_offset, mask_function=mask_function, attention_mask=attention_mask,
        **positions, **options,
    )  # fmt: skip


def _first(positions: Tensor) -> int | Tensor:
    """The first position as a number, where reading it breaks no graph."""
    return positions[0] if torch.compiler.is_compiling() or _capturing(positions) else int(positions[0])


def _capturing(x: Tensor) -> bool:
    """Whether x cannot be read now: a graph is being captured, or x has no data."""
    return (
        torch._C._get_tracing_state() is not None
        or x.is_meta
        or type(x) not in (Tensor, torch.nn.Parameter)
        or (x.is_cuda and torch.cuda.is_current_stream_capturing())
    )


def _band(
    shape: tuple[int, int, int, int], q_offset: Any, kv_offset: Any, function: Callable[..., Any] | None, options: dict[str, Any]
) -> tuple[int | None, int | None, bool, int | Tensor | None] | None:
    """(left, right, top_left, diagonal) of :class:`Visible`, or None if the visible keys are no band."""
    if isinstance(q_offset, Tensor) and q_offset.numel() != 1:
        return None
    M = shape[2]
    diagonal, top_left = _diagonal(shape, q_offset, kv_offset)
    causal, two_sided = bool(options.get("allow_is_causal_skip", True)), bool(options.get("allow_is_bidirectional_skip", False))
    if causal:
        left = _causal_left(function, options, q_offset + M)
        return None if left == 0 else (left, 0, top_left, diagonal)
    if two_sided:
        reach = _reach(function, options)
        if reach is None:
            return (None, None, False, None)
        return None if reach == 0 else (reach, reach, False, 0 if top_left else diagonal)
    return None


def _diagonal(shape: tuple[int, int, int, int], q_offset: Any, kv_offset: Any) -> tuple[int | Tensor | None, bool]:
    """(diagonal, top_left) of :class:`Visible`."""
    B, _, M, N = shape
    diagonal = q_offset - kv_offset
    if isinstance(diagonal, Tensor):  # of a static cache: known on the device alone, and counted up in place
        return diagonal.clone().reshape(1).expand(B), False
    return (None, False) if diagonal == N - M else (None, True) if diagonal == 0 else (diagonal, False)


def _blocks(
    shape: tuple[int, int, int, int],
    q_offset: Any,
    kv_offset: Any,
    function: Callable[..., Any] | None,
    mask: Tensor | None,
    options: dict[str, Any],
) -> Visible | None:
    """Of rows that hold several sequences, or of chunks: blocks along the diagonal, or the one block in which all queries stand."""
    if torch.compiler.is_compiling() or any(isinstance(x, Tensor) and x.numel() != 1 for x in (q_offset, kv_offset)):
        return None
    config = options.get("config")
    # Of packed rows, and of one query beside a static cache, transformers always says no; so do models that compute with their mask.
    if not options.get("allow_is_causal_skip", True) and (config is None or _wants_whole(type(config))):
        return None
    parts = parts_of(function)
    if parts is None or not parts.causal or (parts.chunk is None and parts.sequences is None):
        return None
    B, _, M, N = shape
    left = None if parts.window is None else parts.window - 1
    held = [x for x in (parts.left, parts.sequences, mask) if x is not None]
    reads = not any(map(_capturing, held))
    if M == N and not isinstance(q_offset, Tensor) and q_offset == kv_offset == 0:
        found = offsets_of(parts, B, N, mask) if reads and N else None
        return None if found is None else Visible(shape, left, 0, offsets=found[0], used=found[1])
    if parts.sequences is not None:
        return None
    starts = chunk_starts(parts, M, q_offset, kv_offset, reads)
    if starts is None:
        return None
    diagonal, top_left = _diagonal(shape, q_offset, kv_offset)
    keys, lengths, hidden = _padding(mask, N, kv_offset)
    starts = starts.expand(B) if hidden is None else torch.maximum(starts, hidden)
    return Visible(shape, left, 0, top_left, keys, lengths, None, starts, diagonal)


def _in_static_cache(
    shape: tuple[int, int, int, int], q_offset: Any, kv_offset: Any, function: Callable[..., Any] | None, options: dict[str, Any]
) -> bool:
    """Whether the visible keys are those of plain causal attention in a cache of which the device alone knows how full it is."""
    from transformers.masking_utils import causal_mask_function

    if not isinstance(q_offset, Tensor) or q_offset.dim() or isinstance(kv_offset, Tensor) or kv_offset != 0:
        return False
    if function is not None and function is not causal_mask_function:
        return False
    # Of one query beside such a cache transformers always says no; so do models that compute with their mask.
    config = options.get("config")
    return shape[2] == 1 and config is not None and not _wants_whole(type(config))


@torch.compiler.assume_constant_result
def _wants_whole(config: type) -> bool:
    """Whether models of this configuration's package ask for a whole mask."""
    package = config.__module__.rpartition(".")[0]
    return any("allow_is_causal_skip=False" in _text(name) for name in _modeling(package))


def _modeling(package: str) -> list[str]:
    """The modules of a package that hold models."""
    return [
        name for name in list(sys.modules) if name.rpartition(".")[0] == package and name.rpartition(".")[2].startswith("modeling_")
    ]  # fmt: skip


@functools.cache
def _text(name: str) -> str:
    try:
        return inspect.getsource(sys.modules[name])
    except (OSError, TypeError):
        return ""


def _hidden_keys(mask: Tensor | Visible | None, N: int) -> Tensor | None:
    """A bool padding mask of the keys so far as a row of N keys, if it hides any; what follows is beyond them."""
    if mask is None:
        return None
    assert isinstance(mask, Tensor)
    if mask.dtype != torch.bool:
        mask = mask.to(torch.bool)
    if not torch.compiler.is_compiling() and not _capturing(mask) and mask.all():
        return None
    missing = N - mask.shape[-1]
    mask = torch.nn.functional.pad(mask, (0, missing), value=True) if missing > 0 else mask[:, :N]
    return mask[:, None, None, :]


def _causal_left(function: Callable[..., Any] | None, options: dict[str, Any], end: int | Tensor) -> int | None:
    """How many keys before itself a query sees: None is all of them, 0 that this is no window."""
    from transformers.masking_utils import causal_mask_function

    local = options.get("local_size")
    if function is None or function is causal_mask_function:
        return None
    config = options.get("config")
    window, chunk = getattr(config, "sliding_window", None), getattr(config, "attention_chunk_size", None)
    if local is not None and local == window and local != chunk:
        return local - 1 if local > 1 else 0
    if local is not None and local == chunk and local != window and not isinstance(end, Tensor) and end <= chunk:
        return None  # one chunk holds every position
    return 0


def _reach(function: Callable[..., Any] | None, options: dict[str, Any]) -> int | None:
    """How far to either side a query sees: None is all keys, 0 that this is no window."""
    from transformers.masking_utils import bidirectional_mask_function

    local = options.get("local_size")
    if function is bidirectional_mask_function:
        return None
    return local if local is not None and local == getattr(options.get("config"), "sliding_window", None) else 0


def _padding(mask: Tensor | None, N: int, offset: int | Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The keys of a bool padding mask that these N are: (keys, lengths, starts) of :class:`Visible`, keys or the others."""
    if mask is None:
        return None, None, None
    if isinstance(offset, Tensor):  # which of its keys these are, the device knows alone
        at = offset + torch.arange(N, device=mask.device)
        shown = mask.to(torch.bool).index_select(1, at.clamp(max=mask.shape[1] - 1)) & (at < mask.shape[1])
        return shown[:, None, None, :], None, None
    missing = offset + N - mask.shape[-1]
    if missing > 0:
        mask = torch.nn.functional.pad(mask, (0, missing))
    mask = mask[:, offset : offset + N]
    if mask.dtype != torch.bool:
        mask = mask.to(torch.bool)
    if not torch.compiler.is_compiling() and not _capturing(mask):
        # One read a forward pass, as for SDPA: nothing is hidden, or only keys at the ends, which are then not even visited.
        falling = (mask[:, 1:] <= mask[:, :-1]).all()
        changes = (mask[:, 1:] != mask[:, :-1]).sum(-1) + mask[:, 0]  # of entries with one run of keys 1 or 2
        single = (changes + mask[:, -1] <= 2).all()
        count = mask.sum(-1)
        reach = (mask[:, -1] | (count == 0)).all()
        everything, at_end, one_run, to_the_end = torch.stack([mask.all(), falling, single, reach]).tolist()
        if everything:
            return None, None, None
        if at_end:
            return None, count, None
        if one_run and facts_of(mask.device).arch != "sm90":  # whose own kernels take a row of keys and no starts
            starts = torch.where(count == 0, N, mask.to(torch.uint8).argmax(-1))
            return None, None if to_the_end else starts + count, starts
    return mask[:, None, None, :], None, None


@torch.compiler.assume_constant_result
def refuse_unrouted(config: type) -> None:
    """Raise ValueError if the models of this configuration keep their attention to themselves and would misread a bool mask."""
    if name := _unrouted(config):
        raise bad_value(
            "attn_implementation",
            f"'eager' for the models of {name}",
            "'triattention'",
            "not all their attention uses transformers' interface; triflash.integrations.transformers.patch(model) is for some",
        )


# Own attention beside the interface, whose class does not name its configuration; and one that makes masks of its own for it.
_PARTLY = frozenset({"BigBirdPegasusConfig", "GitConfig", "InformerConfig"})
_OWN_MASKS = frozenset({"LongT5Config"})
# Files of other models beside one: ESMFold's trunk takes no mask of transformers' own, and its language model is ESM's, by the interface.
_BESIDE = frozenset({"modeling_esmfold"})


@functools.cache
def _unrouted(config: type) -> str:
    """The module that has attention of its own for this configuration, or an empty string."""
    package = config.__module__.rpartition(".")[0]
    for name in _modeling(package):
        file, text = name.rpartition(".")[2], _text(name)
        if file in _BESIDE or not text:
            continue
        used = re.compile(rf"\b{config.__name__}\b")
        if "ALL_ATTENTION_FUNCTIONS" not in text:
            found = bool(re.search(r"^class \w*Attention\w*\(nn\.Module\):", text, re.MULTILINE) and used.search(text))
        else:
            found = config.__name__ in _PARTLY or any(used.search(body) for body in own_attention(text).values())
            found = found and config.__name__ not in _OWN_MASKS
        if found:
            return file
    return ""


def own_attention(text: str) -> dict[str, str]:
    """The classes of a modeling file that take a mask to a softmax of their own, and their text."""
    classes = re.split(r"^(?=class |def |@)", text, flags=re.MULTILINE)
    named = ((match[1], body) for body in classes if (match := re.match(r"class (\w*Attention\w*)\(", body)))
    own = re.compile(r"softmax\(|scaled_dot_product_attention\(")
    return {
        name: body for name, body in named
        if own.search(body) and "ALL_ATTENTION_FUNCTIONS" not in body and re.search(r"attention_mask|\bmask\b", body)
    }  # fmt: skip
