"""ipywidgets: one widget on both sides, known by the id of its model in the front end.

A widget that travels has a twin over there. Both talk to the same model. What the front end says
goes to the one that was made first, whose callbacks run where it lives; what cells change follows
with the variables, before and after each remote cell.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import comm
from ipywidgets.widgets import widget as ipywidgets
from traitlets.traitlets import EventHandler

from mlinfra_sdk.objects.realm import current_realm
from mlinfra_sdk.objects.reducers import current_shell

if TYPE_CHECKING:
    from mlinfra_sdk.objects.codec import Encoder

# What each side has for itself, or only while a message is sent.
_OWN_TRAITS = frozenset(("comm", "log", "_property_lock", "_states_to_send"))
_OWN_ATTRIBUTES = frozenset(
    (
        *("_trait_values", "_trait_notifiers", "_trait_validators", "_cross_validation_lock"),
        *("_holding_sync", "_model_id", "_repr_mimebundle_"),
    )
)

# Closed widgets, too, which ipywidgets itself forgets.
_travelled: weakref.WeakValueDictionary[str, Any] = weakref.WeakValueDictionary()


def reduce_widget(encoder: Encoder, widget: Any) -> Any:
    """A widget by its model's id and its state."""
    model = widget._model_id if widget.comm is None else widget.model_id
    if model is None:  # never opened: nothing says which one it is
        return encoder.stub(widget)
    _travelled[model] = widget
    traits = widget._trait_values.items()
    state = {
        "open": widget.comm is not None,
        "traits": {name: value for name, value in traits if name not in _OWN_TRAITS},
        "attributes": {k: v for k, v in vars(widget).items() if k not in _OWN_ATTRIBUTES},
        "observers": [
            (name, kind, handler)
            for name, by_kind in widget._trait_notifiers.items()
            for kind, handlers in by_kind.items()
            for handler in handlers
            if not isinstance(handler, EventHandler)  # those come with the class
        ],
    }
    return make_widget, (type(widget), model), state, None, None, set_widget


def make_widget(kind: Any, model: str) -> Any:
    """The widget of this model, or a new twin that has said nothing to the front end."""
    widget = find(model) or _travelled.get(model)
    if widget is None:
        widget = kind.__new__(kind)
        widget._model_id = model
        made: Any = comm.create_comm(comm_id=model, primary=False, target_name="jupyter.widget")
        made.kernel = getattr(current_shell(), "kernel", None)  # else it sends nothing
        made.on_msg(widget._handle_msg)
        if model not in comm.get_comm_manager().comms:
            comm.get_comm_manager().register_comm(made)
        widget._trait_values["comm"] = made
        ipywidgets._instances[model] = _travelled[model] = widget
    return widget


def set_widget(widget: Any, state: dict[str, Any]) -> None:
    """Brings a widget to this state. The front end knows it already, and observers have run."""
    current_realm().states.append((apply_widget_state, widget, state))
    apply_widget_state(widget, state)


def apply_widget_state(widget: Any, state: dict[str, Any]) -> None:
    """As :func:`set_widget`, for an object that is known to be changed."""
    widget._trait_values.update(state["traits"])
    vars(widget).update(state["attributes"])
    notifiers = widget._trait_notifiers
    for by_kind in notifiers.values():
        for handlers in by_kind.values():
            handlers[:] = [it for it in handlers if isinstance(it, EventHandler)]
    for name, kind, handler in state["observers"]:
        notifiers.setdefault(name, {}).setdefault(kind, []).append(handler)
    if widget.comm is not None and not state["open"]:
        _closed(widget)


def _closed(widget: Any) -> None:
    """The other side has closed it: as ``close``, without a word to the front end."""
    closing = widget.comm
    closing._closed = True
    ipywidgets._instances.pop(closing.comm_id, None)
    comm.get_comm_manager().comms.pop(closing.comm_id, None)
    widget._trait_values["comm"] = None
    widget._repr_mimebundle_ = None


def find(model: str) -> Any:
    """The open widget of a model, or None."""
    return ipywidgets._instances.get(model)


def follow(model: str, state: dict[str, Any], paths: list[Any], buffers: list[bytes]) -> None:
    """The front end and the other side have agreed on a part of the state meanwhile."""
    widget = find(model)
    if widget is None:
        return
    state = dict(state)
    ipywidgets._put_buffers(state, paths, buffers)
    for name in state.keys() & set(widget.keys):
        try:
            decoded = widget.trait_metadata(name, "from_json", widget._trait_from_json)
            widget._trait_values[name] = decoded(state[name], widget)
        except Exception:  # names widgets that are not here yet: they come after the cell
            continue
