"""A loaded model with the settings of a run, for one prompt or a chat."""

from __future__ import annotations

import secrets
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import click
import jax
import numpy as np
from jaxpaged_model.llama import ModelFn

from jaxpaged.app import processes
from jaxpaged.app.animation import PageMapRecorder
from jaxpaged.app.answer_format import check_format, grammar_processor
from jaxpaged.app.breakers import breaker_tokens
from jaxpaged.app.cache_type import CacheType, check_hadamard
from jaxpaged.app.errors import InputError, nan_message, say
from jaxpaged.app.kv_report import CachePlan, KVReport
from jaxpaged.app.loading import ForbidTokens, ReadyModel, open_model
from jaxpaged.app.options import GenerateOptions
from jaxpaged.app.run import Run, generate
from jaxpaged.app.timings import Timings, since_start, start_lines
from jaxpaged.cache.groups import LayerGroup
from jaxpaged.generation.request import ContextShift
from jaxpaged.generation.result import FINISH_NAN
from jaxpaged.generation.sampling_params import SamplingParams
from jaxpaged.sharding.mesh import BatchSharding
from jaxpaged.sharding.multihost import broadcast_object

_ENDLESS = 2**18
"""Limit of -n -1 with context shifts; arrays for so many tokens are allocated at once."""
_SMALLEST_SHIFTED = 8
_COMMON_POOL = 8192
"""Tokens of the pool of a single sequence, if its context has as many: a prompt of 4,096 and as
many to generate."""


@dataclass
class Session:
    """Model, context and seed of a process, and the sums of its runs' timings."""

    options: GenerateOptions
    ready: ReadyModel
    context: int
    """Tokens of a sequence, at most."""
    seed: int
    """Seed of the first sequence."""
    timings: Timings = field(default_factory=Timings)
    pages_peak: int | np.ndarray = 0
    """In a cache of several layer groups, one number for each."""
    first_token: float | None = None
    """Seconds from the start of the process to the first token of the first run."""
    start: list[str] = field(default_factory=list)
    """Lines about what that time was spent on."""
    recorder: PageMapRecorder | None = None
    """Recorder of ``--page-map``."""
    logits_processor: Any = None
    """That of ``--json-schema`` and ``--grammar``."""

    @classmethod
    def open(cls, options: GenerateOptions) -> Session:
        """Loads the model and describes it on stderr."""
        if options.context_shift and not options.paged:
            raise InputError("--context-shift needs a paged cache, not --no-kv-cache-paged")
        if options.context_shift and 0 < options.ctx_size < _SMALLEST_SHIFTED:
            raise InputError(f"--context-shift needs a context (-c) of at least {_SMALLEST_SHIFTED} tokens")
        if options.kv_pages is not None and not options.paged:
            raise InputError("--kv-pages bounds a pool of pages, and --no-kv-cache-paged asks for none")
        if options.prompt_cache is not None and not options.paged:
            raise InputError("--prompt-cache keeps pages, and --no-kv-cache-paged asks for none")
        if options.prompt_cache is None and (options.prompt_cache_all or options.prompt_cache_ro):
            raise InputError("--prompt-cache-all and --prompt-cache-ro need --prompt-cache FILE")
        check_hadamard(options.hadamard, options.cache_type_k, options.cache_type_v)
        check_format(options)
        _check_processes(options)
        recorder = PageMapRecorder.open(options)
        ready = open_model(options, mesh=options.mesh, show_progress=options.log)
        trained = ready.loaded.config.context_length
        session = cls(
            options,
            ready,
            context=options.ctx_size or trained,
            seed=broadcast_object(secrets.randbits(32)) if options.seed < 0 else options.seed,
            timings=Timings(load_ms=ready.load_ms),
            recorder=recorder,
            logits_processor=grammar_processor(options, ready.loaded.tokenizer),
        )
        loaded = ready.loaded
        session.note(f"model = {loaded.path}, {loaded.description}, computing in {ready.dtype}")
        if loaded.mesh is not None:
            session.note(f"mesh = {processes.describe_mesh(loaded.mesh)}")
        if session.context > trained:
            session.note(
                f"warning: -c {session.context} is more than the {trained} tokens the model was trained for"
            )
        if options.seed < 0 and options.is_random and options.beams == 1:
            session.note(f"seed = {session.seed}")
        return session

    @property
    def model(self) -> ModelFn:
        """The model; with --ignore-eos, without the tokens that end a text."""
        stops = tuple(sorted(self.ready.loaded.tokenizer.stop_ids))
        return ForbidTokens(self.ready.call, stops) if self.options.ignore_eos and stops else self.ready.call

    def note(self, line: str) -> None:
        """Prints a line on stderr, unless --log-disable."""
        if self.options.log and processes.is_main():
            say(line)

    def encode(self, text: str, *, add_special: bool = True) -> list[int]:
        """Token ids of a prompt; the names of control tokens in it become these tokens."""
        tokenizer = self.ready.loaded.tokenizer
        ids = tokenizer.encode(text, add_special=add_special, parse_special=True)
        if tokenizer.add_bos and ids[:2] == [tokenizer.bos_id] * 2:
            bos = tokenizer.decode(ids[:1], skip_special=False)
            self.note(f"warning: the prompt begins with {bos}, which the tokenizer adds as well")
        # The text continues, so no EOS.
        return ids[:-1] if add_special and tokenizer.add_eos else ids

    def check_prompt(self, ids: Sequence[int]) -> None:
        """Raises InputError if a prompt is empty or fills the context."""
        if not ids:
            raise InputError("the prompt is empty, and this model has no token that begins a text")
        room = self.context - (self.options.predict != 0)
        if len(ids) > room:
            raise InputError(
                f"the prompt has {len(ids)} tokens; the context of {self.context} (-c) allows {room}"
                f"{' and one to generate' if self.options.predict else ''}"
            )
        if self.options.verbose_prompt:
            decode = self.ready.loaded.tokenizer.decode
            for token in ids:
                say(f"{token:8d} -> {decode([token], skip_special=False)!r}")

    def new_tokens(self, prompt_length: int) -> int:
        """Number of tokens to generate after a prompt, at most."""
        room = _ENDLESS if self.options.context_shift else self.context - prompt_length
        return room if self.options.predict < 0 else min(self.options.predict, room)

    def context_shift(self, prompt: Sequence[int]) -> ContextShift | None:
        """Context shift of a sequence that begins with ``prompt``; None without --context-shift."""
        o, tokenizer = self.options, self.ready.loaded.tokenizer
        if not o.context_shift:
            return None
        begins = int(tokenizer.bos_id is not None and prompt[0] == tokenizer.bos_id)
        keep = len(prompt) if o.keep < 0 else min(o.keep + begins, len(prompt))
        return ContextShift(self.context, n_keep=keep)

    @property
    def groups(self) -> tuple[LayerGroup, ...] | None:
        """Layer groups of the cache; None if all layers keep all tokens."""
        o = self.options
        # A prompt cache is for prompts that share a beginning of any length.
        keeps = o.swa_full or not o.paged or o.prompt_cache is not None
        groups = self.ready.loaded.local_config.groups
        narrow = any(group.window is not None and group.window < self.context for group in groups)
        return groups if narrow and not keeps else None

    @property
    def cache_type(self) -> CacheType:
        """Page formats of keys and values."""
        o, own = self.options, self.ready.dtype
        return CacheType.of(o.cache_type_k or own, o.cache_type_v or own, o.hadamard)

    def plan(self, tokens: int, num_seqs: int, shared: int = 0) -> CachePlan:
        """Plans a cache for ``num_seqs`` sequences of ``tokens`` tokens, of which all share the first ``shared``."""
        o, spare, loaded = self.options, 0, self.ready.loaded
        # Samples are spread over the data shards of a mesh; the beams of a search are not.
        each = num_seqs if o.beams > 1 else BatchSharding.of(loaded.mesh, 1, num_seqs).samples_per_shard
        if o.context_shift:
            tokens, spare = min(tokens, self.context), 2
        if num_seqs == 1 and self.options.kv_pages is None:
            # Runs of any length then share the programs of one pool.
            tokens = max(tokens, min(self.context, _COMMON_POOL))
        return CachePlan.make(
            loaded.local_config,
            mesh=loaded.mesh,
            paged=self.options.paged,
            cache_type=self.cache_type,
            num_seqs=each,
            context=self.context,
            tokens=max(1, tokens),
            page_size=self.options.page_size,
            groups=self.groups,
            step_tokens=o.step_tokens,
            kv_pages=self.options.kv_pages,
            shared=shared,
            spare=spare,
            # A draft may fill a page, which is then finalized with rejected tokens in it.
            unused=o.num_draft if self.cache_type.has_residual else 0,
        )

    def completion(self, prompt: str, num_seqs: int) -> tuple[list[int], int, CachePlan]:
        """Prepares the continuation of a prompt, without a chat, in ``num_seqs`` sequences.

        Returns:
          ``(ids, new, plan)``: the prompt's tokens, the number of tokens to generate, and a cache for them.
        """
        if self.options.system is not None:
            self.note("-sys has no effect outside a chat (-no-cnv)")
        ids = self.encode(prompt)
        self.check_prompt(ids)
        new = self.new_tokens(len(ids))
        plan = self.plan(len(ids) + new, num_seqs, shared=len(ids))
        plan.check_prompt(len(ids))
        return ids, new, plan

    def run(
        self,
        cache: Any,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        samples: int = 1,
        keep: bool = False,
        context_shift: ContextShift | None = None,
        history: Sequence[int] = (),
        on_start: Callable[[], None] | None = None,
        on_prompt: Callable[[Any], None] | None = None,
        on_tokens: Callable[[list[list[int]]], None],
    ) -> Run:
        """Generates, and adds to the sums of timings.

        Args:
          history: tokens that the cache already holds.
          on_start: called before the prefill, and may print.
          on_prompt: called with the cache after the prefill.
          on_tokens: called with each row's new tokens.
        """
        o = self.options
        loaded = self.ready.loaded
        rows = len(prompts) * samples
        values = o.sampling_values()
        breakers = breaker_tokens(o.dry_sequence_breakers, loaded.tokenizer) if o.dry_multiplier else ()
        # The whole context, so that one program serves all turns of a chat.
        for name in ("repeat_last_n", "dry_penalty_last_n"):
            values[name] = values[name] if values[name] >= 0 else self.context
        sampling = SamplingParams.create(
            rows,
            **values,
            dry_breakers=sorted(breakers),
            seed=[self.seed_of(row) for row in range(rows)],
        )
        notice = ""
        if o.log and o.warmup and sys.stderr.isatty() and processes.is_main():
            notice = "compiling, some seconds the first time ..."
        click.echo(notice, nl=False, err=True)

        def start() -> None:
            if notice:
                click.echo("\r\033[K", nl=False, err=True)
            if on_start is not None:
                on_start()

        recorder, read = self.recorder, False
        if recorder is not None:
            recorder.add("before the prompt", cache)

        def record(cache: Any, generated: int) -> None:
            nonlocal read
            if on_prompt is not None and not read:
                on_prompt(cache)
            if recorder is not None:
                label = f"{generated} tokens generated" if read else "prompt read, first token generated"
                recorder.add(label, cache, recorder.every if read else None)
            read = True

        def pass_on(tokens: list[list[int]]) -> None:
            if self.first_token is None:
                self.first_token = since_start()
            on_tokens(tokens)

        run = generate(
            self.model,
            loaded.params,
            cache,
            prompts,
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            stop_ids=sorted(loaded.tokenizer.stop_ids),
            batch_size=o.step_tokens,
            samples=samples,
            keep=keep,
            context_shift=context_shift,
            lookup=o.num_draft if max_new_tokens else 0,
            logits_processor=self.logits_processor,
            history=[history] * len(prompts),
            warmup=o.warmup,
            every=None if recorder is None else lambda: recorder.every,
            # Elsewhere than on a CPU, rows of padding cost little.
            fixed_steps=rows == 1 and (loaded.skips_padding or jax.default_backend() != "cpu"),
            on_start=start,
            on_cache=record,
            on_tokens=pass_on,
        )
        if not self.start:
            self.end_start(run.timings, run.cache_hit)
        self.timings.add(run.timings)
        self.pages_peak = np.maximum(self.pages_peak, run.pages_peak)
        return run

    def end_start(self, timings: Timings, cache_hit: bool) -> None:
        """Records what the time up to the first token was spent on; ``timings`` are the first run's."""
        self.start = start_lines(
            self.ready.opened,
            self.ready.loaded.seconds,
            timings.compile_ms,
            cache_hit,
            timings.prompt_ms,
            self.first_token or since_start(),
        )

    def write_page_map(self) -> None:
        """Writes the file of ``--page-map``."""
        if self.recorder is not None:
            self.recorder.write()

    def seed_of(self, row: int) -> int:
        """Seed of a sequence."""
        return (self.seed + row) % 2**32

    def report(self, plan: CachePlan) -> KVReport:
        """KV memory used so far."""
        return KVReport.of(plan, self.pages_peak)

    def print_report(self, plan: CachePlan, run: Run | None) -> None:
        """Prints timings and KV memory on stderr."""
        if run is not None and run.out_of_pages:
            rows = ", ".join(str(row + 1) for row in run.out_of_pages)
            which = f" of sequence {rows}" if len(run.tokens) > 1 else ""
            counts = ", ".join(str(len(run.tokens[row])) for row in run.out_of_pages)
            self.note(
                f"out of pages: the text{which} ends after {counts} tokens, all {plan.num_pages[0]} pages of "
                f"{plan.page_size} tokens are in use (--kv-pages)"
            )
        for line in self.start if self.options.verbose and self.options.log and processes.is_main() else ():
            click.echo(line, err=True)
        if run is not None and self.options.perf and self.options.log and processes.is_main():
            drafts = [] if not run.drafted else [run.drafts_line()]
            for line in [*self.timings.lines(), *drafts, self.report(plan).line()]:
                click.echo(line, err=True)

    def refuse_nan(self, run: Run) -> None:
        """Raises InputError if a sequence ended with NaN."""
        if FINISH_NAN in run.finish_reason:
            raise InputError(nan_message(self.ready.dtype))


def _check_processes(options: GenerateOptions) -> None:
    """Refuses flags that a mesh, or several processes, do not support."""
    mesh = processes.count() > 1 or options.mesh is not None
    if mesh and options.page_map is not None:
        raise InputError("--page-map draws the pool of one device, not of a --mesh")
    given = (options.json_schema, options.json_schema_file, options.grammar, options.grammar_file)
    if mesh and any(text is not None for text in given):
        raise InputError("--json-schema and --grammar work on one device, not on a --mesh")
    if processes.count() > 1 and options.prompt_cache is not None:
        raise InputError("--prompt-cache works in one process; this run has several")
