"""Gradient of a replay: how much the model's last hidden states depend on what each layer's attention adds.

KVgrad's backward pass (OpenReview:cg1wTCJjjk).  Weights get no gradient, and the prompt's cache has none.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UnsupportedModelError
from ..models.compat import find_decoder_layers
from ..models.tensor_parallel import find_head_shards


def check_gradient(model: Any, name: str) -> None:
    """Check, before anything runs, that the model can be differentiated.

    Parameters
    ----------
    model : PreTrainedModel
        The model.
    name : str
        Name of the selector that needs the gradient, for the message.

    Raises
    ------
    UnsupportedModelError
        With quantized weights, weights created in inference mode or gradient checkpointing in training, under
        tensor parallelism, with flex attention, or if it is not clear which modules are the decoder layers.
    """
    backend = model.config.get_text_config(decoder=True)._attn_implementation
    tensors = itertools.chain(model.parameters(), model.buffers())
    faults = {
        "quantized weights, whose kernels may have no gradient": getattr(model, "is_quantized", False)
        or getattr(model, "hf_quantizer", None) is not None,
        "its heads split over processes": find_head_shards(model) is not None,
        "attn_implementation='flex_attention', which has no gradient everywhere": backend == "flex_attention",
        "weights created in torch.inference_mode()": any(tensor.is_inference() for tensor in tensors),
        "gradient checkpointing in training mode, which drops the cache": model.training
        and any(getattr(module, "gradient_checkpointing", False) for module in model.modules()),
        "no list of as many decoder layers as its config says": not find_decoder_layers(model),
    }
    found = [fault for fault, is_there in faults.items() if is_there]
    if found:
        raise UnsupportedModelError(
            f"selector {name!r} runs the model backward, and this model has {found[0]}: use selector 'kvzip_plus', "
            "which needs no gradient."
        )


class ReplayGradient:
    """Differentiate the last hidden states of a replay by what each layer's attention adds to the residual stream.

    ``Phi = sum over replay tokens p of ||h_p||_2^2``, where ``h`` is the output of the last decoder layer, before the
    final norm.  One backward pass gives the gradient at every attention output ``a_p``.

    Parameters
    ----------
    model : PreTrainedModel
        A model that :func:`check_gradient` accepts.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._outputs: dict[nn.Module, Tensor] = {}
        self._last: Tensor | None = None

    @contextmanager
    def watch(self) -> Iterator[ReplayGradient]:
        """Note what the attention modules and the last decoder layer return; give weights no gradient meanwhile."""
        layers = find_decoder_layers(self._model)
        trained = [parameter for parameter in self._model.parameters() if parameter.requires_grad]
        handles = [
            layers[0].register_forward_pre_hook(_begin_graph, with_kwargs=True),
            layers[-1].register_forward_hook(self._note_last),
            *(
                module.register_forward_hook(self._note_output)
                for module in self._model.modules()
                if hasattr(module, "layer_idx")
            ),
        ]
        try:
            for parameter in trained:
                parameter.requires_grad_(False)
            yield self
        finally:
            for handle in handles:
                handle.remove()
            for parameter in trained:
                parameter.requires_grad_(True)
            self._forget()

    def compute_norms(self, modules: Sequence[nn.Module]) -> list[Tensor]:
        """Return the norms of the gradient of Phi at each module's output, ``[batch, token]`` float32; free the graph.

        Raises
        ------
        UnsupportedModelError
            If the output of a module was not seen.
        """
        missing = [module for module in modules if module not in self._outputs]
        if self._last is None or missing:
            name = type(missing[0]).__name__ if missing else "the last decoder layer"
            raise UnsupportedModelError(
                f"the output of {name} was not seen, so it has no gradient: use selector 'kvzip_plus', which needs "
                "none."
            )
        scale = self._last.detach().float().abs().amax().clamp(min=1.0)
        size = (self._last.float().square() / scale).sum()
        gradients = torch.autograd.grad(size, [self._outputs[module] for module in modules])
        self._forget()
        return [gradient.float().norm(dim=-1) * scale for gradient in gradients]

    def _note_output(self, module: nn.Module, args: Any, output: Any) -> None:
        states = _take_states(output)
        if states is not None:
            self._outputs[module] = states

    def _note_last(self, module: nn.Module, args: Any, output: Any) -> None:
        self._last = _take_states(output)

    def _forget(self) -> None:
        self._outputs.clear()
        self._last = None


@contextmanager
def run_backward() -> Iterator[None]:
    """Let autograd record, also where the caller turned it off."""
    with torch.inference_mode(False), torch.enable_grad():
        yield


def _begin_graph(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Let the graph begin at the hidden states that enter the first decoder layer."""
    if args:
        return (_make_leaf(args[0]), *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": _make_leaf(kwargs["hidden_states"])}


def _make_leaf(states: Tensor) -> Tensor:
    # Cloned twice: a tensor of inference mode has no gradient, and some models change what they get in place.
    return states.detach().clone().requires_grad_().clone()


def _take_states(output: Any) -> Tensor | None:
    states = output[0] if isinstance(output, tuple) else output
    return states if isinstance(states, Tensor) and states.requires_grad else None
