"""What a case must run on a backend: which kernels in which order, and what must be refused. Called by ``running.py``, which holds it to that."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch

from cases import Case, Inputs, bias_shape
from here import ON_HOPPER
from judging import HOPPER
from triflash.plan.configs import MAX_HEAD_DIM, OWNERS_OF_KEYS
from triflash.plan.device import KNOWN_DEVICES, facts_of
from triflash.plan.hopper import adds_dq
from triflash.plan.kernels import short
from triflash.plan.kernels.dkdv import DkdvConfig, of_pairs
from triflash.plan.override import Config
from triflash.plan.select import plan_backward, plan_forward
from triflash.spec import AttentionSpec, Needs, spec_of

Configs = Mapping[str, Config]  # of kernels, by their names


def kernels(ran: list[str]) -> list[str]:
    """The kernels' names of a record of launches, as ``once``."""
    return [line.split()[1] for line in once(ran)]


def once(ran: list[str]) -> list[str]:
    """A record of launches in which a kernel that is launched for each of its loops, first for small lse, is one."""
    small, other = " for small lse", " for any lse"
    at = [number for number, line in enumerate(ran) if line.endswith(small)]
    assert [ran[number].removesuffix(small) + other for number in at] == [line for line in ran if line.endswith(other)]
    assert all(ran[number + 1].endswith(other) for number in at)
    return [line.removesuffix(small) for line in ran if not line.endswith(other)]


def dbias_kernel(case: Case, shape: tuple[int, ...]) -> str:
    """Which kernel the gradient of a bias of this shape comes from: the pass for dq has every ds of a bias of full shape, the pass for dk
    and dv the sums over queries of one that varies over keys only, if heads are not grouped; any other has its own."""
    full = (case.B // case.batch_inner, case.batch_inner, case.H, case.M, case.N)
    if len(shape) < 5:
        batch, *rest = (1,) * (4 - len(shape)) + shape
        shape = (batch, 1, *rest)
    varies = [own == size for own, size in zip(shape, full, strict=True)]
    if all(varies):
        return "dq"
    return "dkdv" if varies[4] and not varies[3] and case.key_heads == case.H else "dbias"


def expected_kernels(case: Case, backend: str, inputs: Inputs, adds: bool = False) -> list[str]:
    """What must run, in order, and nothing else; where something is summed up in parts, a ``…_sum`` may follow.

    adds: on Hopper, the kernel that gives dk or dv adds up dq wherever it can.
    """
    there = {"b": case.bias is not None and case.bias_dtype != torch.bool, "s": case.sink, "t": case.second is not None}
    wanted = [n for n in case.grads if there.get(n, True)]
    if backend not in ("triton", *HOPPER):
        return ["forward", "backward"] if wanted else ["forward"]
    if 0 in (case.B, case.H, case.M):
        return []
    if case.N == 0:
        return ["forward"]
    steps = ["forward"]
    if backend in HOPPER:
        return steps + _expected_on_hopper(case, wanted, inputs, adds) if wanted else steps
    steps += ["delta"] if set(wanted) & set("qkbst") else []
    sources = dbias_kernels(case, wanted, inputs)
    steps += _owners_of_keys(case, wanted, inputs) if set(wanted) & set("kv") or "dkdv" in sources else []
    steps += ["dq"] if "q" in wanted or "dq" in sources else []
    return steps + ["dbias"] * sources.count("dbias")


def _owners_of_keys(case: Case, wanted: list[str], inputs: Inputs) -> list[str]:
    """One launch for dk and dv, or one each where that was faster: by the plan's own rule, which test_owners_of_keys.py is about."""
    if case.tiles is not None or not inputs.q.is_cuda or max(case.D, case.Dv or case.D) <= 128:
        return ["dkdv"]
    needs = Needs(*(letter in wanted for letter in "qkvbst"))
    steps = plan_backward(spec_of_case(case, inputs), needs, facts_of(inputs.q.device), "triton").steps
    return [step.kernel for step in steps if step.kernel in OWNERS_OF_KEYS]


def dbias_kernels(case: Case, wanted: Iterable[str], inputs: Inputs) -> list[str]:
    """Which kernels the gradients of biases come from. A pass gives one of them; where both fall out of the same, the second has its own."""
    given = [x for letter, x in (("b", inputs.bias), ("t", inputs.second_bias)) if letter in wanted and x is not None]
    sources = [dbias_kernel(case, tuple(x.shape)) for x in given]
    return [*sources[:1], *("dbias" if source in sources[:1] else source for source in sources[1:])]


def _expected_on_hopper(case: Case, wanted: list[str], inputs: Inputs, adds: bool) -> list[str]:
    sources = dbias_kernels(replace(case, Hk=None), wanted, inputs)
    narrow = max(case.D, case.Dv or case.D) <= 128
    adding = adds and narrow and "q" in wanted and bool(set(wanted) & set("kv")) and "dq" not in sources
    steps = ["preprocess"]
    if set(wanted) & set("kv") or "dkdv" in sources:
        steps += ["dqdkdv" if adding else "dkdv"]
    steps += ["dq"] if ("q" in wanted and not adding) or "dq" in sources else []
    steps += ["postprocess"] if adding else []
    return steps + ["dbias"] * sources.count("dbias")


def is_to_add_dq(case: Case, inputs: Inputs, raw: bool, configs: Configs) -> bool:
    """Whether Hopper is to add up dq wherever it can: if ``small_tiles`` or the test has a configuration for that, else by the plan's own
    rule, which test_hopper_steps.py is about.

    Not in the seed's functions under PyTorch's deterministic algorithms, which ``poisoned_allocations`` turns on.
    """
    if torch.are_deterministic_algorithms_enabled() and not (case.is_raw or raw):
        return False
    if "dqdkdv" in configs or (case.tiles is not None and not configs):
        return True
    return adds_dq(spec_of_case(case, inputs), Needs(True, True, True, False), KNOWN_DEVICES["sm90"].shared_memory)


def sums_dq_by_pairs(case: Case, inputs: Inputs, configs: Configs) -> bool:
    """Whether Hopper sums dq up in shared memory, if it gives dq with dk or dv: by the configuration, else by the plan's rule."""
    own = configs.get("dqdkdv")
    if own is not None or (case.tiles is not None and not configs):
        return isinstance(own, DkdvConfig) and own.dq_blocks > 0
    return of_pairs(spec_of_case(case, inputs), facts_of(inputs.q.device), {}, ("dk", "dv", "dq")) is not None


def spec_of_case(case: Case, inputs: Inputs) -> AttentionSpec:
    x = inputs.operands()
    return spec_of(
        *x[:4], case.batch_inner, *case.band, case.softmax_scale, "", *x[4:9], case.softcap, case.dropout, False, *x[13:], case.shift
    )


def expected_launches(case: Case, backend: str, inputs: Inputs, adds: bool = False) -> list[str]:
    """``expected_kernels`` as they are recorded. The automatic choice may take its forward pass from another backend than its backward pass."""
    forward = backward = backend
    if backend == "auto":
        spec, facts = spec_of_case(case, inputs), facts_of(inputs.q.device)
        wanted = inputs.wanted()
        needs = Needs(*(letter in wanted for letter in "qkvbst"))
        forward, backward = plan_forward(spec, facts).backend, plan_backward(spec, needs, facts).backend
    names = expected_kernels(case, backward, inputs, adds)
    if "triton" in (forward, backward):
        names = _by_short_rows(case, inputs, names, forward == "triton", backward == "triton")
    forward, backward = ("hopper" if each == "stand-in" else each for each in (forward, backward))
    return [f"{forward if name == 'forward' else backward}: {name}" for name in names]


def with_mask_bounds(case: Case, inputs: Inputs, launches: list[str]) -> list[str]:
    """With the kernel that looks where a mask shows anything, as it runs when it is chosen by hand: before each pass in which a kernel walks
    what it finds. A dq that also gives the gradient of a bias does not.
    """
    mask = inputs.mask if inputs.bias is not None and inputs.bias.dtype != torch.bool else inputs.operands().bias
    if mask is None or mask.dtype != torch.bool:
        return launches
    at = launches.index("hopper: preprocess") if "hopper: preprocess" in launches else len(launches)
    names = [line.split()[1] for line in launches[at:]]
    full = "b" in inputs.wanted() and inputs.bias is not None and dbias_kernel(replace(case, Hk=None), tuple(inputs.bias.shape)) == "dq"
    walking = bool({"dkdv", "dqdkdv"} & {*names}) or ("dq" in names and not full)
    return [*["hopper: mask_bounds"] * (at > 0), *launches[:at], *["hopper: mask_bounds"] * walking, *launches[at:]]


def _by_short_rows(case: Case, inputs: Inputs, names: list[str], forward: bool, backward: bool) -> list[str]:
    """With the kernels for short rows where the plan takes them by itself, which test_short_rows.py is about."""
    if case.tiles is not None:  # chosen by hand, of the other kernels
        return names
    spec, facts, wanted = spec_of_case(case, inputs), facts_of(inputs.q.device), inputs.wanted()
    if forward and names[:1] == ["forward"] and short.forward_steps(spec, facts, {}):
        names = ["short_forward", *names[1:]]
    needs = Needs(*(letter in wanted for letter in "qkvbst"))
    if backward and len(names) > 1 and (steps := short.backward_steps(spec, needs, facts, {})):
        left = sum(letter in wanted and name not in steps[0].gives for letter, name in (("b", "dbias"), ("t", "dsecond")))
        names = [*names[:1], "short_backward", *["dbias"] * left]
    return names


def lacks_backward(case: Case, inputs: Inputs) -> bool:
    """Whether Hopper runs the forward pass alone: with a bias (or a mask without one) that does not vary over keys."""
    bias = inputs.operands().bias
    return bias is not None and bias.shape[-1] != case.N


def lacks_dbias(case: Case, inputs: Inputs) -> bool:
    """Whether Hopper gives every gradient but the bias's: beside a mask of queries, one that is summed by a kernel of its own."""
    if inputs.bias is None or inputs.mask is None or inputs.bias.dtype == torch.bool:
        return False
    return inputs.mask.shape[-2] == case.M > 1 and dbias_kernel(replace(case, Hk=None), tuple(inputs.bias.shape)) == "dbias"


def what_hopper_gives(case: Case, inputs: Inputs) -> Case:
    """The case, asking for those gradients alone."""
    if lacks_backward(case, inputs):
        return replace(case, grads="", dlse=False)
    if lacks_dbias(case, inputs):
        return replace(case, grads=case.grads.replace("b", ""), dlse=case.dlse and case.grads != "b")
    return case


def is_unsupported(case: Case, backend: str, device: torch.device) -> bool:
    on_interpreter = device.type == "cpu"
    dtypes = (case.dtype, case.bias_dtype if case.bias else None)
    if backend in HOPPER:
        there = ON_HOPPER or backend == "stand-in"
        can = there and case.dtype in (torch.float16, torch.bfloat16) and torch.float64 not in dtypes
        empty = 0 in (case.B, case.H, case.M, case.N)
        masked = case.mask is not None and case.bias is not None  # beside a bias, both must vary over keys
        if case.second is not None and sorted((len(p) > 1 and p[-2] == "q", p[-1] == "k") for p in (case.bias or "", case.second)) != [
            (False, True),
            (True, True),
        ]:
            return True  # of two biases, one varies over queries and keys and one over keys alone
        apart = masked and any(bias_shape(case, pattern)[-1] != case.N for pattern in (case.bias, case.mask))
        return not can or empty or apart or max(case.D, case.Dv or case.D) > MAX_HEAD_DIM
    return backend == "triton" and (torch.float64 in dtypes or (on_interpreter and torch.bfloat16 in dtypes))


def lse_may_be_large(case: Case, inputs: Inputs) -> bool:
    """Whether Hopper's ``preprocess`` is asked if every lse is small, and may say no."""
    bias = inputs.operands().bias
    return max(case.D, case.Dv or 0) <= 128 and ((bias is not None and bias.dtype != torch.bool) or case.alibi is not None)
