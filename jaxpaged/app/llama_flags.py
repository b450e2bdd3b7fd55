"""llama.cpp's way of writing flags, and those of its flags that have nothing to do here."""

from __future__ import annotations

from difflib import get_close_matches

import click

from jaxpaged.app.errors import say

_PLACEMENT = "JAX places the whole model on its default device (JAX_PLATFORMS chooses another)"
_LOADING = "weights are read once and handed to JAX"
_ONE_POOL = "all sequences share one pool of pages anyway"
_ONE_BATCH = "there is one batch anyway, which sequences join and leave"
_THREADS = "XLA uses one pool of threads, see -t"
_TERMINAL = "the output is plain text"
_SLOTS = "every request finds the prompts of all others in the one prefix cache"
_PAGE = "the page in the browser has no settings on the command line"
_DRAFTS = "the server drafts no tokens"
_HTTP = "one thread serves HTTP, another computes"

# name -> (number of values, why it has nothing to do); -1 = a value only if the next word looks like a switch
_IGNORED: dict[str, tuple[int, str]] = {
    **dict.fromkeys(("-ngl", "--gpu-layers", "--n-gpu-layers"), (1, _PLACEMENT)),
    **dict.fromkeys(("-sm", "--split-mode", "-ts", "--tensor-split", "-mg", "--main-gpu"), (1, _PLACEMENT)),
    **dict.fromkeys(
        ("-dev", "--device", "-ot", "--override-tensor", "-ncmoe", "--n-cpu-moe"), (1, _PLACEMENT)
    ),
    **dict.fromkeys(
        ("-cmoe", "--cpu-moe", "-nkvo", "--no-kv-offload", "-kvo", "--kv-offload"), (0, _PLACEMENT)
    ),
    **dict.fromkeys(
        ("--no-op-offload", "--op-offload", "--no-host", "-nr", "--no-repack", "--repack"), (0, _PLACEMENT)
    ),
    **dict.fromkeys(("-fit", "--fit"), (1, _PLACEMENT)),
    **dict.fromkeys(
        ("--mlock", "--mmap", "--no-mmap", "-dio", "--direct-io", "-ndio", "--no-direct-io"), (0, _LOADING)
    ),
    **dict.fromkeys(("--check-tensors",), (0, _LOADING)),
    "--numa": (1, _LOADING),
    **dict.fromkeys(("-fa", "--flash-attn"), (-1, "attention never builds the whole score matrix anyway")),
    **dict.fromkeys(("--jinja", "--no-jinja"), (0, "chat templates are always rendered as Jinja")),
    **dict.fromkeys(("-kvu", "--kv-unified", "-no-kvu", "--no-kv-unified"), (0, _ONE_POOL)),
    **dict.fromkeys(("-cb", "--cont-batching", "-nocb", "--no-cont-batching"), (0, _ONE_BATCH)),
    "--swa-full": (0, "every layer keeps all of its tokens"),
    **dict.fromkeys(("-dt", "--defrag-thold"), (1, "pages do not fragment")),
    **dict.fromkeys(("-tb", "--threads-batch"), (1, _THREADS)),
    **dict.fromkeys(("-C", "--cpu-mask", "-Cr", "--cpu-range", "-Cb", "--cpu-mask-batch"), (1, _THREADS)),
    **dict.fromkeys(("-Crb", "--cpu-range-batch", "--cpu-strict", "--cpu-strict-batch"), (1, _THREADS)),
    **dict.fromkeys(("--prio", "--prio-batch", "--poll", "--poll-batch"), (1, _THREADS)),
    **dict.fromkeys(("-co", "--color"), (-1, _TERMINAL)),
    **dict.fromkeys(("--simple-io", "-mli", "--multiline-input", "-sp", "--special"), (0, _TERMINAL)),
    **dict.fromkeys(("--log-colors",), (-1, _TERMINAL)),
    **dict.fromkeys(("--log-prefix", "--log-timestamps", "-v", "--verbose", "--log-verbose"), (0, _TERMINAL)),
    **dict.fromkeys(("-lv", "--verbosity", "--log-verbosity"), (1, _TERMINAL)),
    **dict.fromkeys(("-ptc", "--print-token-count"), (1, _TERMINAL)),
    **dict.fromkeys(("--in-prefix", "--in-suffix"), (1, "the chat template frames what is typed")),
    **dict.fromkeys(("--in-prefix-bos", "--in-prompt"), (0, "the chat template frames what is typed")),
    **dict.fromkeys(("--no-mmproj", "--no-mmproj-auto"), (0, "models here read text only")),
    **dict.fromkeys(("-sps", "--slot-prompt-similarity"), (1, _SLOTS)),
    **dict.fromkeys(("--cache-reuse", "-cram", "--cache-ram", "-cms", "--checkpoint-min-step"), (1, _SLOTS)),
    **dict.fromkeys(("-ctxcp", "--ctx-checkpoints", "--swa-checkpoints"), (1, _SLOTS)),
    **dict.fromkeys(("--cache-idle-slots", "--no-cache-idle-slots"), (0, _SLOTS)),
    **dict.fromkeys(("--ui-config", "--webui-config", "--ui-config-file", "--webui-config-file"), (1, _PAGE)),
    **dict.fromkeys(("--no-ui-mcp-proxy", "--no-webui-mcp-proxy"), (0, _PAGE)),
    **dict.fromkeys(("--threads-http", "-to", "--timeout", "--sse-ping-interval"), (1, _HTTP)),
    "--reuse-port": (0, _HTTP),
    "--sleep-idle-seconds": (1, "a server that waits computes nothing"),
    "--tags": (1, "tags change nothing that the server does"),
    **dict.fromkeys(("-no-ag", "--no-agent"), (0, "the server has no tools")),
    **dict.fromkeys(("-td", "--threads-draft", "-tbd", "--threads-batch-draft"), (1, _DRAFTS)),
    **dict.fromkeys(("-ctkd", "--cache-type-k-draft", "-ctvd", "--cache-type-v-draft"), (1, _DRAFTS)),
    **dict.fromkeys(("--draft-min", "--draft-n-min", "--draft-p-min", "--draft-p-split"), (1, _DRAFTS)),
    "--reasoning-format": (1, "answers are text as the model writes it"),
}
_SWITCH_VALUES = {"on", "off", "auto", "enabled", "disabled", "true", "false", "0", "1", "-1"}


def ignored_flags() -> list[str]:
    """The flags of llama.cpp that are accepted without effect."""
    return list(_IGNORED)


class LlamaCommand(click.Command):
    """A command whose flags are written as llama.cpp's: ``-np 4``, ``--n_predict 4`` for ``--n-predict 4``.

    A word with one dash is one flag, never several letters or a letter with its value: ``-foo`` is not
    ``-f oo``.
    A flag of llama.cpp's that means nothing here is dropped with a line that says why.
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
                    count == 1 or (count == -1 and args and args[0].lower() in _SWITCH_VALUES)
                ):
                    args.pop(0)
                if not quiet:
                    say(f"{name} is accepted and has no effect: {reason}")
            else:
                # click's own idea of a close match is wide, and in its older versions every name is one.
                near = get_close_matches(name, [*takes_value, *_IGNORED], cutoff=0.75)
                raise click.NoSuchOption(name, possibilities=near, ctx=ctx)
        return kept

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Options under the headings that their ``group`` names, in the order they were declared."""
        groups: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None:
                groups.setdefault(getattr(parameter, "group", "Other"), []).append(record)
        for title, records in groups.items():
            with formatter.section(title):
                formatter.write_dl(records)


class GroupedOption(click.Option):
    """An option with the heading it stands under in ``--help``."""

    def __init__(self, *args: object, group: str = "Other", **kwargs: object) -> None:
        super().__init__(*args, **kwargs)  # type: ignore[arg-type]
        self.group = group
