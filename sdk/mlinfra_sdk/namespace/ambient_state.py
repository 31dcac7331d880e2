"""Reading and writing of each piece of process-global state as plain values.

``get_*`` give None where there is nothing to read; those of libraries are called only when the
library is loaded. ``set_*`` skip what this side does not know (another version's options).
"""

from __future__ import annotations

import array
import builtins
import os
import random
import re
import sys
import warnings
from typing import Any

from mlinfra_sdk.namespace.ambient_logging import file_logging, stream_logging

__all__ = ["file_logging", "stream_logging"]


# Python


def get_random() -> Any:
    version, words, gauss = random.getstate()
    return version, array.array("I", words).tobytes(), gauss


def set_random(value: Any) -> None:
    version, words, gauss = value
    random.setstate((version, tuple(array.array("I", words)), gauss))


def get_cwd() -> str:
    return os.getcwd()


def set_cwd(value: str) -> None:
    os.chdir(value)


def get_interpreter() -> Any:
    return sys.getrecursionlimit()


def set_interpreter(value: int) -> None:
    sys.setrecursionlimit(value)


class Environ:
    """What has changed in ``os.environ`` since this module was imported (None: removed)."""

    _OWN = re.compile(r"(JPY_|MLINFRA_|PYDEVD_).*|PWD|OLDPWD|SHLVL|_|LINES|COLUMNS")

    def __init__(self) -> None:
        self._base = dict(os.environ)
        self._raw: object = None
        self._changes: dict[str, str | None] = {}

    def get(self) -> dict[str, str | None]:
        # Decoding all variables for every cell would cost more than most of the other state.
        raw = getattr(os.environ, "_data", None)
        if raw is None or raw != self._raw:
            self._raw = dict(raw or {})
            self._changes = self._compare(dict(os.environ))
        return self._changes

    def _compare(self, now: dict[str, str]) -> dict[str, str | None]:
        base = self._base
        names = [name for name in {**base, **now} if now.get(name) != base.get(name)]
        return {name: now.get(name) for name in sorted(names) if not self._OWN.fullmatch(name)}

    def set(self, value: dict[str, str | None]) -> None:
        changes = {name: self._base.get(name) for name in self.get()} | value
        for name, text in changes.items():
            if text is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = text


class SysPath:
    """What has been added to ``sys.path`` since this module was imported, and where."""

    def __init__(self) -> None:
        self._base = list(sys.path)

    def get(self) -> list[tuple[int, str]]:
        """Each added entry with the number of first entries before it."""
        base, added, position = set(self._base), [], 0
        for entry in sys.path:
            if entry in base:
                position += 1
            else:
                added.append((position, entry))
        return added

    def set(self, value: list[tuple[int, str]]) -> None:
        base = [entry for entry in sys.path if entry in set(self._base)]
        for position, entry in reversed(value):
            base.insert(position, entry)
        sys.path[:] = base


environ = Environ()
sys_path = SysPath()


def get_warnings() -> Any:
    """The filters for Python's own categories; those of libraries come with the libraries."""
    return [
        (action, _pattern(message), category.__name__, _pattern(module), line)
        for action, message, category, module, line in _filters()
        if category.__module__ == "builtins"
    ]


def set_warnings(value: Any) -> None:
    merged = [
        (action, _compiled(message), getattr(builtins, category), _compiled(module), line)
        for action, message, category, module, line in value
        if hasattr(builtins, category)
    ]
    # Filters for other categories stay before the one that they were before.
    own: list[Any] = []
    for item in _filters():
        if item[2].__module__ != "builtins":
            own.append(item)
        elif item in merged:
            index = merged.index(item)
            merged[index:index] = own
            own = []
    _filters()[:] = [*merged, *own]
    with warnings.catch_warnings():
        pass  # makes the interpreter look at the filters again


def _filters() -> list[Any]:
    filters: list[Any] = warnings.filters  # type: ignore[assignment]
    return filters


def _pattern(pattern: Any) -> Any:
    return (pattern.pattern, pattern.flags) if isinstance(pattern, re.Pattern) else pattern


def _compiled(pattern: Any) -> Any:
    return re.compile(*pattern) if isinstance(pattern, tuple) else pattern


def get_decimal() -> Any:
    context = sys.modules["decimal"].getcontext()
    traps = sorted(signal.__name__ for signal, on in context.traps.items() if on)
    limits = (context.Emin, context.Emax, context.capitals, context.clamp)
    return (context.prec, context.rounding, limits, traps)


def set_decimal(value: Any) -> None:
    context = sys.modules["decimal"].getcontext()
    context.prec, context.rounding, limits, traps = value
    context.Emin, context.Emax, context.capitals, context.clamp = limits
    for signal in context.traps:
        context.traps[signal] = signal.__name__ in traps


# IPython


def get_ipython() -> Any:
    shell = _shell()
    if shell is None:
        return None
    text = shell.display_formatter.formatters["text/plain"]
    return {
        "ast_node_interactivity": shell.ast_node_interactivity,
        "autocall": shell.autocall,
        "float_precision": text.float_precision,
        "max_seq_length": text.max_seq_length,
        "pprint": text.pprint,
        "xmode": shell.InteractiveTB.mode,
    }


def set_ipython(value: Any) -> None:
    shell = _shell()
    if shell is None:
        return
    text = shell.display_formatter.formatters["text/plain"]
    for owner, names in (
        (shell, ("ast_node_interactivity", "autocall")),
        (text, ("float_precision", "max_seq_length", "pprint")),
    ):
        for name in names:
            if getattr(owner, name) != value[name]:
                setattr(owner, name, value[name])
    if shell.InteractiveTB.mode != value["xmode"]:
        shell.InteractiveTB.set_mode(mode=value["xmode"])


def _shell() -> Any:
    return sys.modules["IPython"].get_ipython()


# numpy


_PRINT_OPTIONS = (
    *("precision", "threshold", "edgeitems", "linewidth", "suppress", "nanstr", "infstr"),
    *("floatmode", "sign", "formatter", "legacy"),
)


def get_numpy() -> Any:
    numpy = sys.modules["numpy"]
    options = numpy.get_printoptions()
    return {name: options[name] for name in _PRINT_OPTIONS if name in options}, numpy.geterr()


def set_numpy(value: Any) -> None:
    numpy = sys.modules["numpy"]
    options, errors = value
    numpy.set_printoptions(**options)
    numpy.seterr(**errors)


def get_numpy_random() -> Any:
    state = sys.modules["numpy.random"].get_state(legacy=False)
    if state["bit_generator"] == "MT19937":  # as bytes: the usual one is read for every cell
        state["state"]["key"] = state["state"]["key"].tobytes()
    return state


def set_numpy_random(value: Any) -> None:
    if value["bit_generator"] == "MT19937":
        key = sys.modules["numpy"].frombuffer(value["state"]["key"], dtype="uint32")
        value["state"]["key"] = key
    sys.modules["numpy.random"].set_state(value)


# pandas, matplotlib, scikit-learn


def get_pandas() -> Any:
    return _flat(sys.modules["pandas"].options.d, "")


def set_pandas(value: Any) -> None:
    pandas = sys.modules["pandas"]
    current = _flat(pandas.options.d, "")
    for name, option in value.items():
        if name in current and current[name] != option:
            pandas.set_option(name, option)


def _flat(tree: dict[str, Any], prefix: str) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            flat.update(_flat(value, f"{prefix}{name}."))
        else:
            flat[prefix + name] = value
    return flat


# Where figures go is a matter of the process.
_BACKEND = re.compile(r"backend.*|interactive|toolbar|webagg\..*|tk\..*|savefig\.directory")


def get_matplotlib() -> Any:
    """The parameters that differ from matplotlib's defaults."""
    matplotlib = sys.modules["matplotlib"]
    # By the methods of dict: looking up "backend" would choose one.
    current, default = matplotlib.rcParams, matplotlib.rcParamsDefault
    if dict.__eq__(current, default):
        return {}
    default = dict(dict.items(default))
    return {
        name: value
        for name, value in dict.items(current)
        if value != default.get(name) and not _BACKEND.fullmatch(name)
    }


def set_matplotlib(value: Any) -> None:
    matplotlib = sys.modules["matplotlib"]
    for name in get_matplotlib():
        if name not in value:
            dict.__setitem__(
                matplotlib.rcParams, name, dict.__getitem__(matplotlib.rcParamsDefault, name)
            )
    matplotlib.rcParams.update(
        {name: item for name, item in value.items() if name in matplotlib.rcParams}
    )


def get_inline() -> Any:
    """The configuration of matplotlib's inline figures (``%config InlineBackend``)."""
    backend = sys.modules["matplotlib_inline.config"].InlineBackend
    if not backend.initialized():
        return None
    config = backend.instance()
    return {
        "figure_formats": sorted(config.figure_formats),
        "print_figure_kwargs": dict(config.print_figure_kwargs),
        "close_figures": config.close_figures,
    }


def set_inline(value: Any) -> None:
    shell = _shell() if "IPython" in sys.modules else None
    config = sys.modules["matplotlib_inline.config"].InlineBackend.instance(parent=shell)
    if shell is not None and getattr(config, "shell", None) is None:
        config.shell = shell
    if shell is not None and config not in shell.configurables:
        shell.configurables.append(config)
    config.print_figure_kwargs = value["print_figure_kwargs"]
    config.figure_formats = set(value["figure_formats"])
    config.close_figures = value["close_figures"]


def get_sklearn() -> Any:
    return sys.modules["sklearn"].get_config()


def set_sklearn(value: Any) -> None:
    sklearn = sys.modules["sklearn"]
    known = sklearn.get_config()
    sklearn.set_config(**{name: option for name, option in value.items() if name in known})


# torch


_TORCH_PRINT_OPTIONS = ("precision", "threshold", "edgeitems", "linewidth", "sci_mode")


def get_torch() -> Any:
    torch = sys.modules["torch"]
    options = torch._tensor_str.PRINT_OPTS
    return {
        "dtype": str(torch.get_default_dtype()).removeprefix("torch."),
        "grad": torch.is_grad_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "warn_only": torch.is_deterministic_algorithms_warn_only_enabled(),
        "matmul": torch.get_float32_matmul_precision(),
        "cudnn": (torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic),
        "print": {name: getattr(options, name) for name in _TORCH_PRINT_OPTIONS},
    }


def set_torch(value: Any) -> None:
    torch = sys.modules["torch"]
    torch.set_default_dtype(getattr(torch, value["dtype"]))
    torch.set_grad_enabled(value["grad"])
    torch.use_deterministic_algorithms(value["deterministic"], warn_only=value["warn_only"])
    torch.set_float32_matmul_precision(value["matmul"])
    torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = value["cudnn"]
    torch.set_printoptions(**value["print"])


def get_torch_random() -> Any:
    """The CPU generator's state; those of CUDA stay with their device, but for their seed."""
    return sys.modules["torch"].get_rng_state().numpy().tobytes()


def set_torch_random(value: bytes) -> None:
    torch = sys.modules["torch"]
    generator = torch.default_generator
    before = generator.initial_seed()
    state = torch.frombuffer(bytearray(value), dtype=torch.uint8)
    generator.set_state(state)
    seed = generator.initial_seed()
    # torch.manual_seed seeds the generators of all devices, also of those that only the machine
    # has. Without a GPU here this is put off until there is one, as torch itself does.
    if seed != before or torch.equal(torch.Generator().manual_seed(seed).get_state(), state):
        torch.cuda.manual_seed_all(seed)
