"""llama.cpp's syntax of flags, and its flags that are accepted without effect."""

from __future__ import annotations

from difflib import get_close_matches

import click

from jaxpaged.app.errors import say

_PLACEMENT = "JAX places the whole model on its default device (JAX_PLATFORMS chooses another)"
_LOADING = "weights are read once and handed to JAX"
_THREADS = "XLA uses one pool of threads, see -t"
_TERMINAL = "the output is plain text"
_SLOTS = "every request finds the prompts of all others in the one prefix cache"
_DRAFTS = "generate drafts from the text (--lookup), the server drafts no tokens; the text stays the same"
_ON_OR_OFF = -1
_TABLE: tuple[tuple[int, str, str], ...] = (
    (1, _PLACEMENT, "-ngl --gpu-layers --n-gpu-layers -sm --split-mode -ts --tensor-split -mg --main-gpu"),
    (1, _PLACEMENT, "-dev --device -ot --override-tensor -ncmoe --n-cpu-moe -fit --fit"),
    (0, _PLACEMENT, "-cmoe --cpu-moe -nkvo --no-kv-offload -kvo --kv-offload --no-host"),
    (0, _PLACEMENT, "--no-op-offload --op-offload -nr --no-repack --repack"),
    (0, _LOADING, "--mlock --mmap --no-mmap -dio --direct-io -ndio --no-direct-io --check-tensors"),
    (1, _LOADING, "--numa"),
    (_ON_OR_OFF, "attention never builds the whole score matrix", "-fa --flash-attn"),
    (0, "chat templates are always rendered as Jinja", "--jinja --no-jinja"),
    (0, "all sequences share one pool of pages", "-kvu --kv-unified -no-kvu --no-kv-unified"),
    (0, "batching is always continuous", "-cb --cont-batching -nocb --no-cont-batching"),
    (1, "pages do not fragment", "-dt --defrag-thold"),
    (1, _THREADS, "-tb --threads-batch -C --cpu-mask -Cr --cpu-range -Cb --cpu-mask-batch -Crb"),
    (
        1,
        _THREADS,
        "--cpu-range-batch --cpu-strict --cpu-strict-batch --prio --prio-batch --poll --poll-batch",
    ),
    (_ON_OR_OFF, _TERMINAL, "-co --color --log-colors"),
    (0, _TERMINAL, "--simple-io -mli --multiline-input -sp --special --log-prefix --log-timestamps"),
    (0, _TERMINAL, "-v --verbose --log-verbose"),
    (1, _TERMINAL, "-lv --verbosity --log-verbosity -ptc --print-token-count"),
    (1, "the chat template says what stands around a message", "--in-prefix --in-suffix"),
    (0, "the chat template says what stands around a message", "--in-prefix-bos --in-prompt"),
    (0, "models here read text only", "--no-mmproj --no-mmproj-auto"),
    (1, _SLOTS, "-sps --slot-prompt-similarity --cache-reuse -cram --cache-ram"),
    (1, _SLOTS, "-cms --checkpoint-min-step -ctxcp --ctx-checkpoints --swa-checkpoints"),
    (0, _SLOTS, "--cache-idle-slots --no-cache-idle-slots"),
    (1, "the page has no settings here", "--ui-config --webui-config --ui-config-file --webui-config-file"),
    (0, "the page has no settings here", "--no-ui-mcp-proxy --no-webui-mcp-proxy"),
    (1, "one thread serves HTTP, another computes", "--threads-http -to --timeout --sse-ping-interval"),
    (0, "one thread serves HTTP, another computes", "--reuse-port"),
    (1, "tags change nothing that the server does", "--tags"),
    (0, "the server has no tools", "-no-ag --no-agent"),
    (1, _DRAFTS, "-td --threads-draft -tbd --threads-batch-draft -ctkd --cache-type-k-draft -ctvd"),
    (
        1,
        _DRAFTS,
        "--cache-type-v-draft --spec-draft-n-max --spec-draft-n-min --spec-draft-p-min --draft-p-min",
    ),
    (1, _DRAFTS, "--spec-draft-p-split --draft-p-split --spec-draft-threads --spec-draft-threads-batch"),
    (1, _DRAFTS, "--spec-draft-type-k --spec-draft-type-v --spec-type --spec-ngram-mod-n-max"),
    (1, _DRAFTS, "--spec-ngram-mod-n-min --spec-ngram-mod-n-match --spec-ngram-simple-size-n"),
    (1, _DRAFTS, "--spec-ngram-simple-size-m --spec-ngram-simple-min-hits --spec-ngram-map-k-size-n"),
    (1, _DRAFTS, "--spec-ngram-map-k-size-m --spec-ngram-map-k-min-hits --spec-ngram-map-k4v-size-n"),
    (1, _DRAFTS, "--spec-ngram-map-k4v-size-m --spec-ngram-map-k4v-min-hits"),
    (0, _DRAFTS, "--spec-default"),
    (1, "answers are text as the model writes it", "--reasoning-format"),
)
"""(number of values, reason, flags); ``_ON_OR_OFF``: a value only if the next word is one of ``_SWITCH_VALUES``."""
_IGNORED = {name: (count, reason) for count, reason, names in _TABLE for name in names.split()}
_REMOVED = {
    **dict.fromkeys(("--draft", "--draft-n", "--draft-max"), "--spec-draft-n-max"),
    **dict.fromkeys(("--draft-min", "--draft-n-min"), "--spec-draft-n-min"),
}
"""Flags that llama.cpp had, and what it has in their place."""
_HEADINGS = (
    "Model, Prompt, Chat, Text, Tests, A server that runs, Own servers, Generation, Sampling, Batch, KV cache, "
    "Server, Load, Workload, Limits, Devices, Output, Other"
)
"""Headings of ``--help``, in order."""
_SWITCH_VALUES = {"on", "off", "auto", "enabled", "disabled", "true", "false", "0", "1", "-1"}


def ignored_flags() -> list[str]:
    """Names of the flags that are accepted without effect."""
    return list(_IGNORED)


class LlamaCommand(click.Command):
    """A command with llama.cpp's syntax of flags: ``-np 4``, and ``--n_predict 4`` for ``--n-predict 4``.

    A word with one dash is one flag, never several: ``-foo`` is not ``-f oo``. A flag of llama.cpp that has no
    effect here is dropped with a line that says why.
    """

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        return super().parse_args(ctx, self._translate(ctx, list(args)))

    def _translate(self, ctx: click.Context, args: list[str]) -> list[str]:
        takes_value: dict[str, bool] = {}
        for parameter in self.get_params(ctx):
            if isinstance(parameter, click.Option):
                flag = parameter.is_flag or parameter.count
                takes_value |= dict.fromkeys((*parameter.opts, *parameter.secondary_opts), not flag)
        kept: list[str] = []
        quiet = "--log-disable" in args
        while args:
            word = args.pop(0)
            if word == "--":
                return [*kept, word, *args]
            if not word.startswith("-") or word == "-":
                kept.append(word)
                continue
            name, equals, value = word.partition("=") if word.startswith("--") else (word, "", "")
            if name.startswith("--"):
                name = name.replace("_", "-")
            if name in takes_value:
                kept.append(name + equals + value)
                if takes_value[name] and not equals and args:
                    kept.append(args.pop(0))
            elif name in _IGNORED:
                count, reason = _IGNORED[name]
                if count == 1 and not equals and not args:
                    raise click.BadOptionUsage(name, f"Option {name!r} requires an argument.", ctx)
                if not equals and (
                    count == 1 or (count == _ON_OR_OFF and args and args[0].lower() in _SWITCH_VALUES)
                ):
                    args.pop(0)
                if not quiet:
                    say(f"{name} is accepted and has no effect: {reason}")
            elif name in _REMOVED:
                raise click.UsageError(f"{name} was removed, as in llama.cpp: use {_REMOVED[name]}.", ctx)
            else:
                # click's own idea of a close match is wide, and in its older versions every name is one.
                near = get_close_matches(name, [*takes_value, *_IGNORED], cutoff=0.75)
                raise click.NoSuchOption(name, possibilities=near, ctx=ctx)
        return kept

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Writes the flags under the headings that their ``group`` names."""
        groups: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None:
                groups.setdefault(getattr(parameter, "group", "Other"), []).append(record)
        for title, records in sorted(groups.items(), key=lambda group: _HEADINGS.find(group[0])):
            with formatter.section(title):
                formatter.write_dl(records)
