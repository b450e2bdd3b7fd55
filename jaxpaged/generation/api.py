"""Generation for callers on the host: checked arguments, one compiled program, results in their order."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import numpy.typing as npt
from jax import Array

from jaxpaged.cache.interface import Cache
from jaxpaged.compilation.options import compiler_options
from jaxpaged.generation.loop import Model, check_model, run
from jaxpaged.generation.prompts import PromptsLike, token_lists
from jaxpaged.generation.request import (
    EARLY_STOPPING,
    ContextShift,
    EarlyStopping,
    LogitsProcessor,
    Lookup,
    Request,
    SearchParams,
    is_traced,
)
from jaxpaged.generation.result import BeamResult, GenerateResult
from jaxpaged.generation.sampling_params import SamplingParams
from jaxpaged.sharding.mesh import BatchSharding, num_shards
from jaxpaged.sharding.specs import BATCH, CACHE, PARAMS, mesh_of, over_mesh


@functools.cache
def run_donating(platform: str) -> Any:
    """``run`` jitted for a platform; donates the cache."""

    def spread(model: Model, *arguments: Any) -> Any:
        loop = functools.partial(run, model)
        return over_mesh(loop, (PARAMS, CACHE, BATCH), (BATCH, CACHE), gather=True)(*arguments)

    return jax.jit(spread, static_argnums=0, donate_argnums=2, compiler_options=compiler_options(platform))


def gather_result(result: Any, sharding: BatchSharding) -> Any:
    """Results of the data shards of a mesh in the caller's order, on the host; pages are summed
    up."""
    total = functools.partial(np.sum, axis=0)  # of each layer group
    totals: dict[str, Any] = {"pages_peak": total, "num_steps": np.max}
    if isinstance(result, BeamResult):
        totals |= {"unshared_peak": total, "pages_mean": total, "unshared_mean": total}
    return sharding.gather_result(result, **totals)


def _run(model: Model, params: Any, cache: Cache, request: Request, sharding: BatchSharding) -> Any:
    """``(result, cache)`` of a request, on a mesh with the result gathered on the host."""
    check_model(model)
    result, cache = run_donating(jax.default_backend())(model, params, cache, request)
    return (result if mesh_of(cache) is None else gather_result(result, sharding)), cache


def generate(
    model: Model,
    params: Any,
    cache: Cache,
    prompts: PromptsLike,
    *,
    max_new_tokens: npt.ArrayLike,
    prompt_lens: npt.ArrayLike | None = None,
    n: int = 1,
    sampling: SamplingParams | None = None,
    key: Array | None = None,
    stop_ids: Sequence[int] = (),
    batch_size: int = 512,
    keep: bool = False,
    context_shift: ContextShift | None = None,
    history: Sequence[Sequence[int]] = (),
    lookup: Lookup | None = None,
    logprobs: int | None = None,
    logits_processor: LogitsProcessor | None = None,
) -> tuple[GenerateResult, Cache]:
    """Generates a continuation of each prompt, in one XLA program that does not return to Python.

    More prompts than the cache has sequences wait in a queue on the device: when a sequence ends,
    its pages are freed, and the next prompt is prefilled in chunks, in the steps of the sequences
    that decode. A prompt is admitted when there are pages for all that it and the others may yet
    write, so none runs out of pages on the way, unless it is alone.

    Programs are compiled for sizes in buckets: any prompts and ``max_new_tokens`` of up to 4,096
    tokens share a program (fewer where many rows share an array), if their prefill steps have the
    same size: up to 16 tokens, 24, 32, 48, 64 and so on up to ``batch_size``. All else is data,
    ``params`` too.

    Args:
      model: ``(params, tokens i32[T], cache, batch, rows i32[R]) -> (logits f32[R, V], cache)``,
        hashable.
      params: the model's weights, a pytree.
      cache: paged or contiguous; **donated**. With as many sequences as rows, row i continues
        sequence i of the cache; with fewer, all sequences should be empty. A ``ShardedCache`` runs
        the program on its mesh: prompts are distributed over its data shards, or the samples of a
        few prompts are; ``model`` and ``params`` are then of ``load_model(mesh=...)``.
      prompts: token ids, any number of prompts of any lengths, none empty: lists, 1-D arrays, or
        one array ``i32[B, T]``.
      max_new_tokens: maximum number of tokens to generate, one for all or one a prompt.
      prompt_lens: i32[B], tokens of each prompt if ``prompts`` are padded on the right.
      n: samples of each prompt, at most the cache's sequences. They share the prompt's pages, with
        copy-on-write.
      sampling: one row a sample, or one a sequence of the cache if these are more; default greedy,
        or with a ``key`` the defaults of ``SamplingParams.create``.
      key: key of ``jax.random``, from which each sample gets a seed in place of that of
        ``sampling``. ``SamplingParams.unmodified`` samples from the model's own distribution.
      stop_ids: tokens that end a sequence; they are not part of the result.
      batch_size: maximum number of tokens of a prefill step, which may hold parts of several
        prompts.
      keep: leave finished sequences in the cache (without their newest token, which was never an
        input); otherwise their pages are freed when they end. Not with a queue.
      context_shift: continue beyond the context; takes two pages and two table entries a sequence
        more than ``n_ctx`` tokens do. Needs a paged cache with a ``rope``.
      history: tokens before each prompt that the cache holds already: penalties apply to them, and
        ``n_keep`` of a context shift counts them.
      lookup: try drafts from the text so far, several tokens a step. When pages run short, steps go
        without drafts.
      logprobs: return log-probabilities of the tokens, and of that many likeliest ones.
      logits_processor: changes logits before a token is sampled; see ``LogitsProcessor``.

    Returns:
      ``(result, cache)``. A sequence that gets no page ends with FINISH_OUT_OF_PAGES and the tokens
      it has; one whose logits hold NaN ends with FINISH_NAN. Their pages are freed, with ``keep``
      too.

    Raises:
      ValueError: no prompt, an empty prompt, ids that are no integers or negative, a negative
        count, sampling of another size, a prompt that fills the shifted context, ``keep`` with more
        rows than sequences.
    """
    if is_traced(params, cache, prompts, prompt_lens, sampling, key):
        raise ValueError(
            "generate compiles a program of its own; under jit, call "
            "run(model, params, cache, Request.create(cache, prompts, ...))"
        )
    request = Request.create(
        cache,
        prompts,
        max_new_tokens=max_new_tokens,
        prompt_lens=prompt_lens,
        n=n,
        sampling=sampling,
        key=key,
        stop_ids=stop_ids,
        batch_size=batch_size,
        keep=keep,
        context_shift=context_shift,
        history=history,
        lookup=lookup,
        logprobs=logprobs,
        logits_processor=logits_processor,
    )
    sharding = BatchSharding.of(mesh_of(cache), len(prompts), n)
    found: tuple[GenerateResult, Cache] = _run(model, params, cache, request, sharding)
    return found


def beam_request(
    cache: Any,
    prompts: PromptsLike,
    *,
    num_beams: int,
    max_new_tokens: npt.ArrayLike,
    prompt_lens: npt.ArrayLike | None = None,
    length_penalty: float = 1.0,
    early_stopping: EarlyStopping = False,
    num_return_sequences: int = 1,
    stop_ids: Sequence[int] = (),
    batch_size: int = 512,
) -> Request:
    """A request for a beam search; arguments as for ``beam_search``.

    Raises:
      ValueError: as ``beam_search``.
    """
    shards = num_shards(mesh_of(cache))
    max_seqs = cache.max_seqs // shards  # of one data shard
    if not 1 <= num_beams <= max_seqs:
        raise ValueError(f"num_beams must be 1 to {max_seqs} (the cache's max_seqs), got {num_beams}")
    if not 1 <= num_return_sequences <= num_beams:
        raise ValueError(
            f"num_return_sequences must be 1 to {num_beams} (num_beams), got {num_return_sequences}"
        )
    if not np.isfinite(length_penalty):
        raise ValueError(f"length_penalty must be finite, got {length_penalty}")
    if early_stopping not in EARLY_STOPPING:
        raise ValueError(f'early_stopping must be False, True or "never", got {early_stopping!r}')
    ids = token_lists(prompts, prompt_lens)
    most = max_seqs // num_beams * shards
    if not 1 <= len(ids) <= most:
        each = "" if num_beams == 1 else f" / {num_beams} sequences each"
        where = "" if shards == 1 else f", on each of {shards} data shards"
        raise ValueError(f"prompts must be 1 to {most} (max_seqs = {max_seqs}{each}{where}), got {len(ids)}")
    search = SearchParams(
        np.float32(length_penalty), np.int32(EARLY_STOPPING.index(early_stopping)), num_return_sequences
    )
    return Request.create(
        cache,
        ids,
        max_new_tokens=max_new_tokens,
        n=num_beams,
        stop_ids=stop_ids,
        batch_size=batch_size,
        search=search,
    )


def beam_search(
    model: Model,
    params: Any,
    cache: Cache,
    prompts: PromptsLike,
    *,
    num_beams: int,
    max_new_tokens: npt.ArrayLike,
    prompt_lens: npt.ArrayLike | None = None,
    length_penalty: float = 1.0,
    early_stopping: EarlyStopping = False,
    num_return_sequences: int = 1,
    stop_ids: Sequence[int] = (),
    batch_size: int = 512,
) -> tuple[BeamResult, Cache]:
    """Finds likely continuations of each prompt by beam search, in one XLA program.

    Each step continues every beam by every token and keeps the ``num_beams`` likeliest
    continuations that do not end. One that ends with a stop token, or at the limit, and is among
    the ``num_beams`` likeliest of all, competes with the finished ones. The sequences, the scores
    and the end of a search are those of Hugging Face transformers' ``generate(num_beams=...,
    do_sample=False)``.

    Args:
      model: ``(params, tokens i32[T], cache, batch, rows i32[R]) -> (logits f32[R, V], cache)``,
        hashable.
      params: the model's weights, a pytree.
      cache: paged or contiguous; **donated**. Prompt i uses the sequences ``i * num_beams`` up to
        ``(i + 1) * num_beams``: it continues the first of them, replaces the others, and leaves all
        empty. Sequences behind the last prompt's do not change. A ``ShardedCache`` runs the search
        on its mesh, with prompts distributed over the data shards.
      prompts: token ids, 1 to ``max_seqs // num_beams`` prompts, as for ``generate``.
      num_beams: W, the width of the search.
      max_new_tokens: maximum number of tokens to generate, one for all or one a prompt.
      prompt_lens: i32[B], tokens of each prompt if ``prompts`` are padded on the right.
      length_penalty: the score of a finished sequence is its sum of log-probabilities over
        length ** length_penalty, counting the stop token; above 0 favours longer ones.
      early_stopping: end of a prompt's search before the limit, once ``num_beams`` sequences are
        finished: True, at once; False, if the best beam could not win at its present length;
        "never", if it could not at any length.
      num_return_sequences: R, number of finished sequences to return, at most ``num_beams``.
      stop_ids: tokens that end a sequence; they are not part of the result.
      batch_size: maximum number of tokens of a prefill step, which may hold parts of several
        prompts.

    Returns:
      ``(result, cache)``. When pages run short, a search waits for those that have pages for all
      their beams; where none has, the first ends with the best sequences it has, finished or not,
      and its pages serve the others. One whose logits hold NaN ends with FINISH_NAN. ``complete`` is
      False for both.

    Raises:
      ValueError: no prompt or too many, an empty prompt, ids that are no integers or negative, a
        limit below 1, an impossible number of beams or of sequences to return, an infinite penalty,
        an unknown ``early_stopping``.

    Reference: PagedAttention (arXiv:2309.06180), section 4.4, for beams that share pages.
    """
    request = beam_request(
        cache,
        prompts,
        num_beams=num_beams,
        max_new_tokens=max_new_tokens,
        prompt_lens=prompt_lens,
        length_penalty=length_penalty,
        early_stopping=early_stopping,
        num_return_sequences=num_return_sequences,
        stop_ids=stop_ids,
        batch_size=batch_size,
    )
    found: tuple[BeamResult, Cache] = _run(
        model, params, cache, request, BatchSharding(num_shards(mesh_of(cache)), 1)
    )
    return found
