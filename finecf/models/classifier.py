"""What an explainer needs of a classifier: image -> trunk -> map of cells -> head -> logits."""

from __future__ import annotations

import hashlib
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from finecf.models.fold import HeadFold, HeadFolder, tolerance
from finecf.models.layers import (
    Layout,
    all_finite,
    close_names,
    find_layer,
    input_channels,
    input_gradients,
    plain_eval,
    resolve_module,
    unwrap,
)
from finecf.models.tail import Tail

_HALF = (torch.float16, torch.bfloat16)
_CHECKED_IMAGES = 2


def wrap(
    model: nn.Module,
    layer: str | nn.Module | None = None,
    head: str | nn.Module | Callable[[Tensor], Tensor] | None = None,
    preprocess: Callable[..., Tensor] | None = None,
    class_names: Sequence[str] | None = None,
) -> Classifier:
    """Wrap a classifier for the explainers; the model itself is left as it is.

    Args:
        model: any module that maps images [B,Ch,H,W] to logits [B,C] (a tensor, or an object with `.logits`).
            DataParallel and compiled modules are unwrapped.
        layer: the layer whose output is the map of cells: a submodule, its dotted name, or for a VGG its published
            name (`relu5_3`, `pool5`). None: the last layer that gives a map of more than one cell, found by a forward
            of one zero image.
        head: where the first linear layer behind the map is looked for (a submodule or its name), or a function from
            the map [B,D,H,W] to logits. None: it is found.
        preprocess: applied by `Classifier.prepare` to what the user gives, e.g. a torchvision transform.
        class_names: one name per logit.

    Returns:
        The wrapped classifier.

    Raises:
        TypeError: model, layer or head is of a wrong kind.
        ValueError: the layer does not exist or cannot be found.
    """
    return Classifier(model, layer, head, preprocess, class_names)


class Classifier:
    """A model seen as trunk -> cells -> head; made by `finecf.wrap`.

    Every method evaluates the model in eval mode without gradients and without autocast, and puts modes and hooks back
    afterwards, also after an exception. A model that computes in half precision is given half precision, and what it
    gives comes back as float32. Where a single functional ReLU follows the layer (DenseNet), the map is taken after it.

    Attributes:
        model: the module.
        layer_name: name of the layer that gives the map.
        class_names: names of the classes, or None.
        preprocess: what `prepare` applies first, or None.
        fold_reason: why the last `fold` came out as it did.
        head_error: largest difference, so far, between `logits_from(features)` and the real forward; None before the
            first forward.
        head_route: how `logits_from` runs, in words.
    """

    def __init__(
        self,
        model: nn.Module,
        layer: str | nn.Module | None = None,
        head: str | nn.Module | Callable[[Tensor], Tensor] | None = None,
        preprocess: Callable[..., Tensor] | None = None,
        class_names: Sequence[str] | None = None,
    ) -> None:
        self.model = unwrap(model)
        if preprocess is not None and not callable(preprocess):
            raise TypeError(f"preprocess is a {type(preprocess).__name__}; expected a function of the images, or None")
        self.preprocess = preprocess
        self.class_names = None if class_names is None else [str(name) for name in class_names]
        self.fold_reason = "not folded yet"
        self.head_error: float | None = None
        self._warned_training = False
        self._layout: Layout | None = None
        self._image_shapes: dict[tuple[int, ...], tuple[int, ...]] = {}
        self._pyramid_names: dict[tuple[int, ...], list[str]] = {}
        self._head_function: Callable[[Tensor], Tensor] | None = None
        self._head_name: str | None = None
        if head is not None:
            if not isinstance(head, (str, nn.Module)) and callable(head):
                self._head_function = head
            else:
                self._head_name = resolve_module(self.model, head, "head")
        if layer is None:
            self.layer_name = find_layer(self.model, self.model, self.device, self._dtype)
        else:
            self.layer_name = resolve_module(self.model, layer, "layer")
        self._tails: dict[str, Tail] = {}
        self._tail = self._tail_of(self.layer_name)
        if self._head_function is not None:
            self.head_route = "the head function given"
        elif self._tail.traced:
            self.head_route = f"the layers behind {self.layer_name!r}"
        else:
            self.head_route = f"the whole model with the output of {self.layer_name!r} replaced: {self._tail.reason}"
        self._folder: HeadFolder | None = None
        self._num_classes = self._guess_num_classes()
        self._seen_logits = False

    def __repr__(self) -> str:
        return f"Classifier({type(self.model).__name__}, layer={self.layer_name!r}, {self.num_classes} classes)"

    # What the model is

    @property
    def device(self) -> torch.device:
        """Where the model's parameters are."""
        first = next(self.model.parameters(), None)
        return torch.device("cpu") if first is None else first.device

    @property
    def num_classes(self) -> int | None:
        """C; before the first forward it is read off the last linear layer, and None where there is none."""
        return self._num_classes

    @property
    def _dtype(self) -> torch.dtype:
        return next((p.dtype for p in self.model.parameters() if p.is_floating_point()), torch.float32)

    @property
    def dtype(self) -> torch.dtype:
        """What the model's parameters are kept in; float32 where it has none."""
        return self._dtype

    def class_index(self, name_or_index: str | int) -> int:
        """The class's index, from its name or index; a ValueError names the classes there are."""
        if isinstance(name_or_index, str):
            if self.class_names is None:
                raise ValueError(
                    f"class {name_or_index!r} was given by name, but the classifier has no class_names: "
                    "give finecf.wrap(class_names=[...]) or use the index"
                )
            if name_or_index not in self.class_names:
                raise ValueError(f"unknown class {name_or_index!r}: {close_names(name_or_index, self.class_names)}")
            return self.class_names.index(name_or_index)
        if isinstance(name_or_index, bool) or not hasattr(name_or_index, "__index__"):
            raise TypeError(
                f"a class is a {type(name_or_index).__name__} ({name_or_index!r}); expected its index or its name"
            )
        index = name_or_index.__index__()
        if index < 0 or (self.num_classes is not None and index >= self.num_classes):
            last = "" if self.num_classes is None else f"..{self.num_classes - 1}"
            raise ValueError(f"class index {index} is out of range; the classifier has classes 0{last}")
        return index

    def class_name(self, index: int) -> str:
        """The class's name, else its index as text.

        Raises:
            ValueError: there are names, and none for this class.
        """
        if self.class_names is None:
            return str(int(index))
        number = self.class_index(int(index))
        if number >= len(self.class_names):
            raise ValueError(f"{len(self.class_names)} class_names were given, and class {number} has none of them")
        return self.class_names[number]

    # Images

    def prepare(self, images: object) -> Tensor:
        """Images as the model takes them: `preprocess` applied (if any), a batch axis added, checked, on the device.

        Args:
            images: [B,Ch,H,W] or [Ch,H,W]; whatever `preprocess` takes, or a list of that, where it was given.

        Returns:
            Float tensor [B,Ch,H,W]. The other methods take what this gives, and preprocess nothing themselves.

        Raises:
            TypeError: not a float tensor.
            ValueError: wrong rank or channel count, NaN or inf, or a tensor that requires grad.
        """
        if isinstance(images, (list, tuple)):
            if not images:
                raise ValueError("the list of images is empty; give at least one image")
            batches = [self.prepare(image) for image in images]
            if len({batch.shape[1:] for batch in batches}) > 1:
                sizes = sorted({tuple(batch.shape[1:]) for batch in batches})
                raise ValueError(f"the images have different sizes, {sizes}: resize them in preprocess=")
            return torch.cat(batches)
        if self.preprocess is not None:
            images = self.preprocess(images)
        return self._check_images(images)

    def _check_images(self, x: object) -> Tensor:
        if not isinstance(x, Tensor):
            hint = (
                "" if self.preprocess is not None else ", or give finecf.wrap(preprocess=...) a function that makes one"
            )
            raise TypeError(f"images is a {type(x).__name__}; expected a float tensor [B,Ch,H,W] or [Ch,H,W]{hint}")
        if not x.is_floating_point():
            raise TypeError(
                f"images has dtype {x.dtype}; expected float as the model was trained on: "
                "convert it (for 8-bit images images.float() / 255) or give finecf.wrap(preprocess=...)"
            )
        if x.requires_grad:
            raise ValueError("images requires grad, and explanations are not differentiated: pass images.detach()")
        if x.dim() == 3:
            x = x.unsqueeze(0)
        if x.dim() != 4:
            raise ValueError(f"images has shape {list(x.shape)}; expected [B,Ch,H,W], or [Ch,H,W] for one image")
        channels = input_channels(self.model)
        if channels is not None and x.shape[1] != channels:
            hint = "; channels come second: use images.permute(0, 3, 1, 2)" if x.shape[3] == channels else ""
            raise ValueError(
                f"images has {x.shape[1]} channels (shape {list(x.shape)}); the model takes {channels}{hint}"
            )
        if not all_finite(x):
            raise ValueError(f"images holds NaN or inf ({_first_bad(x)}): clean the images before explaining")
        return x.to(self.device)

    # Running the model

    @contextmanager
    def eval_mode(self) -> Iterator[None]:
        """Eval mode, no gradients and no autocast for a while; the modes are put back, also after an exception.

        A model found in train mode is explained as it behaves in eval mode (dropout and batch statistics would make
        every forward another one); that is said once in a warning.
        """
        if self.model.training and not self._warned_training:
            self._warned_training = True
            warnings.warn(
                "the model is in train mode; finecf evaluates it in eval mode and puts train mode back afterwards",
                UserWarning,
                stacklevel=4,
            )
        with plain_eval(self.model, self.device.type):
            yield

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Eval mode and parameters that take no gradient, with gradients on: for losses through the model.

        Inside it `encode` and `head` give tensors with their graph. Modes and `requires_grad` are put back.

        Raises:
            ValueError: the model was made in inference mode, and no gradient passes it.
        """
        if any(parameter.is_inference() for parameter in self.model.parameters()):
            raise ValueError(
                "this needs the model's gradients, and its weights were made in inference mode, which gives none: "
                "build and load the model outside torch.inference_mode() (MirrorCFE draws without gradients with "
                "corrections=0 and no trim)"
            )
        with self.eval_mode(), input_gradients(self.model):
            yield

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The map [B,D,H,W] and the logits [B,C] of images [B,Ch,H,W], unchecked, with their graph: see `frozen`."""
        outputs: list[object] = []

        def keep(_module: nn.Module, _inputs: object, output: object) -> None:
            # Layers behind may work in place.
            outputs.append(output.clone() if isinstance(output, Tensor) else output)

        handle = self.model.get_submodule(self.layer_name).register_forward_hook(keep)
        try:
            logits = self.logits_of(self._forward(x))
        finally:
            handle.remove()
        if len(outputs) != 1:
            raise ValueError(
                f"layer {self.layer_name!r} was called {len(outputs)} times in one forward; "
                "expected once: name another layer"
            )
        return self.map_of(outputs[0], x.shape[2:]), logits

    def head(self, features: Tensor) -> Tensor:
        """The logits [B,C] of maps [B,D,H,W], unchecked, with their graph: see `frozen`."""
        return self._head_logits(features)

    def features_and_logits(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The map [B,D,H,W] and the logits [B,C] of images [B,Ch,H,W], from one forward of the model."""
        x = self._check_images(x)
        with self.eval_mode():
            features, logits = self.encode(x)
            self._check_finite(features, logits)
            self._learn(x, features, logits)
        return features, logits

    def features(self, x: Tensor) -> Tensor:
        """The map of cells [B,D,H,W] of images [B,Ch,H,W], in float32 (float64 for a float64 model)."""
        return self.features_and_logits(x)[0]

    def logits(self, x: Tensor) -> Tensor:
        """The logits [B,C] of images [B,Ch,H,W]."""
        x = self._check_images(x)
        with self.eval_mode():
            logits = self.logits_of(self._forward(x))
        if not all_finite(logits):
            raise ValueError("the model gives NaN or inf logits for these images")
        return logits

    def logits_from(self, features: Tensor) -> Tensor:
        """The logits [B,C] of maps [B,D,H,W]: the rest of the model behind the layer, and nothing else of it."""
        if features.requires_grad:
            raise ValueError("features requires grad, and explanations are not differentiated: pass features.detach()")
        with self.eval_mode():
            logits = self._head_logits(features)
        if not all_finite(logits):
            what = "the head gives" if all_finite(features) else "features holds"
            raise ValueError(f"{what} NaN or inf behind layer {self.layer_name!r}: no logits can be computed")
        return logits

    def pyramid(self, x: Tensor) -> list[Tensor]:
        """Maps [B,D_i,H_i,W_i] from shallow to deep: the last one of each resolution; the last of all is `features`."""
        x = self._check_images(x)
        size = tuple(x.shape[1:])
        if size not in self._pyramid_names:
            self._pyramid_names[size] = self._resolutions(x[:1])
        maps: dict[str, Tensor] = {}
        handles = []
        try:
            for name in self._pyramid_names[size]:
                module = self.model.get_submodule(name)
                handles.append(
                    module.register_forward_hook(
                        lambda _, __, output, name=name: maps.__setitem__(
                            name, self._raise_half(Layout.of(output, name, size[1:]).to_map(output).clone())
                        )
                    )
                )
            features = self.features(x)
        finally:
            for handle in handles:
                handle.remove()
        return [maps[name] for name in self._pyramid_names[size]] + [features]

    # The head

    def fold(self, features: Tensor, images: Tensor | None = None) -> HeadFold | None:
        """The head as sums over cells, checked on `features` [B,D,H,W]; None where it is no such sum.

        `fold_reason` says which kind it is, or why there is none (kernels: linear, first linear, generic). `images`:
        those of the maps, [B,Ch,H,W]; where the head reads the image's shape and no image of it has been run by this
        classifier, the first ones are.
        """
        if self._head_function is not None:
            self.fold_reason = "none: the head is a function given by the user, which is run as it is"
            return None
        if features.shape[0] == 0:
            raise ValueError("features is an empty batch; the head is folded on at least one map")
        if not all_finite(features):
            raise ValueError(f"features of layer {self.layer_name!r} holds NaN or inf")
        if images is not None and self._tail.needs_image and tuple(features.shape[1:]) not in self._image_shapes:
            try:
                self.features(images[:_CHECKED_IMAGES])
            except ValueError as error:
                self.fold_reason = f"none: {error}"
                return None
        if self._folder is None:
            self._folder = HeadFolder(
                self.model, self._head_name, self._head_logits, self._finish, self._tail_of, self._dtype
            )
        with self.eval_mode():
            # A float64 model is compared in its own precision, whatever the features were kept in.
            precision = torch.promote_types(features.dtype, self._dtype)
            fold, self.fold_reason = self._folder.fold(features.detach().to(precision))
        return fold

    def cam(self, features: Tensor, class_index: Tensor | int) -> Tensor:
        """Grad-CAM at the layer: relu of the channels weighted by the class logit's mean gradient, [B,H,W], unscaled.

        Selvaraju et al., ICCV 2017, eq. 1-2. For a linear head the gradients are its weights, and no backward runs.

        Args:
            features: maps [B,D,H,W].
            class_index: class per map, int64 [B], or one int for all.
        """
        classes = torch.as_tensor(class_index, device=features.device).expand(features.shape[0])
        if features.shape[0] == 0:
            return features.new_empty(0, *features.shape[2:])
        fold = self.fold(features[:1])
        if fold is not None and fold.kind == "linear":
            weights = fold.weight[classes] / fold.cells
        else:
            weights = self._gradient(features, classes).mean((2, 3))
        with self.eval_mode():
            return torch.einsum("bd,bdhw->bhw", weights, features).relu()

    def _gradient(self, features: Tensor, classes: Tensor) -> Tensor:
        with self.eval_mode(), torch.inference_mode(False), torch.enable_grad():
            leaf = features.detach().clone().requires_grad_()
            chosen = self._head_logits(leaf).gather(1, classes[:, None]).sum()
            if not chosen.requires_grad:
                raise ValueError(
                    "the head cuts the gradient (a detach or no_grad in the forward), so Grad-CAM cannot be computed"
                )
            return torch.autograd.grad(chosen, leaf)[0]

    def fingerprint(self) -> dict[str, object]:
        """What tells this classifier from another one: model, layer, number of classes (None before the first forward),
        and a digest of the weights.

        The digest is over 16 values of every parameter and buffer, so it takes milliseconds; it is the same on every
        device.
        """
        digest = hashlib.sha256()
        for name, tensor in [*self.model.named_parameters(), *self.model.named_buffers()]:
            if tensor.is_floating_point() and tensor.numel():
                step = max(1, tensor.numel() // 16)
                digest.update(name.encode())
                digest.update(tensor.detach().flatten()[::step][:16].double().cpu().numpy().tobytes())
        return {
            "model": type(self.model).__name__,
            "layer": self.layer_name,
            "classes": self.num_classes if self._seen_logits else None,
            "weights": digest.hexdigest()[:32],
        }

    def differs_from(self, fingerprint: Mapping[str, object]) -> str | None:
        """By what this classifier is another than that of a fingerprint: "model", "layer", "classes" or "weights".

        None where they are the same; what one of them does not know is not compared.
        """
        for what, mine in self.fingerprint().items():
            theirs = fingerprint.get(what)
            if mine is not None and theirs is not None and mine != theirs:
                return what
        return None

    # Inside

    def _tail_of(self, layer: str) -> Tail:
        if layer not in self._tails:
            with plain_eval(self.model, self.device.type):
                self._tails[layer] = Tail(self.model, layer)
        return self._tails[layer]

    def _forward(self, x: Tensor) -> object:
        try:
            # A copy: the model may work in place.
            return self.model(x.to(self._dtype, copy=True))
        except RuntimeError as error:
            if self._dtype in _HALF and "not implemented for" in str(error):
                raise TypeError(
                    f"the model computes in {self._dtype}, which its layers do not support on {self.device.type} "
                    f"({error}): convert it with model.float()"
                ) from error
            raise

    def logits_of(self, output: object) -> Tensor:
        """The logits [B,C] in what the model gave, checked; half precision becomes float32."""
        logits = getattr(output, "logits", output)
        if not isinstance(logits, Tensor):
            raise TypeError(
                f"the model gives a {type(output).__name__}; expected logits [B,C]: wrap it in a module that gives them"
            )
        if logits.dim() != 2 or logits.shape[1] < 2:
            raise ValueError(
                f"the model gives a tensor of shape {list(logits.shape)}; expected logits [B,C] with C >= 2"
            )
        self._num_classes, self._seen_logits = logits.shape[1], True
        if self.class_names is not None and len(self.class_names) != logits.shape[1]:
            raise ValueError(
                f"{len(self.class_names)} class_names were given, and the model has {logits.shape[1]} classes"
            )
        return self._raise_half(logits)

    def map_of(self, output: object, image: Sequence[int]) -> Tensor:
        """The map [B,D,H,W] in what the wrapped layer gave for images of some height and width; half precision becomes
        float32.
        """
        if not isinstance(output, Tensor):
            raise ValueError(
                f"layer {self.layer_name!r} gives a {type(output).__name__}; expected one tensor [B,D,H,W]: "
                "name another layer"
            )
        self._layout = Layout.of(output, self.layer_name, image)
        features = self._raise_half(self._layout.to_map(output))
        return features.relu() if self._tail.relu_follows else features

    def _head_logits(self, features: Tensor) -> Tensor:
        if features.dim() != 4:
            raise ValueError(f"features has shape {list(features.shape)}; expected [B,D,H,W]")
        if self._head_function is not None:
            return self.logits_of(self._head_function(features))
        output = features.to(self._dtype)
        if self._layout is not None:
            output = self._layout.from_map(output)
        image = None
        if self._tail.needs_image:
            shape = self._image_shapes.get(tuple(features.shape[1:]))
            if shape is None:
                raise ValueError(
                    f"the head reads the image's shape, which is not known for a map of shape "
                    f"{list(features.shape[1:])}: call features(x) first"
                )
            image = torch.zeros(1, device=features.device, dtype=self._dtype).expand(features.shape[0], *shape)
        return self.logits_of(self._tail(output, image))

    def _finish(self, layer: str, output: Tensor) -> Tensor:
        with self.eval_mode():
            return self.logits_of(self._tail_of(layer)(output.to(self._dtype), None))

    def _learn(self, x: Tensor, features: Tensor, logits: Tensor) -> None:
        """Remember the image's shape and, for a new one, check the head against the real forward."""
        shape, grid = tuple(x.shape[1:]), tuple(features.shape[1:])
        if self._image_shapes.get(grid) == shape or x.shape[0] == 0:
            return
        self._image_shapes[grid] = shape
        n = _CHECKED_IMAGES
        error = float((self._head_logits(features[:n]) - logits[:n]).abs().max())
        if not error <= tolerance(self._dtype, logits[:n]):
            del self._image_shapes[grid]
            raise ValueError(
                f"the logits cannot be computed from the output of layer {self.layer_name!r} by {self.head_route}: "
                f"they differ from the real forward by {error:.2g}. Something goes around the layer; name another one"
            )
        self.head_error = max(error, self.head_error or 0.0)

    def _check_finite(self, features: Tensor, logits: Tensor) -> None:
        if not all_finite(features):
            raise ValueError(f"layer {self.layer_name!r} gives NaN or inf ({_first_bad(features)})")
        if not all_finite(logits):
            raise ValueError(f"the head behind layer {self.layer_name!r} gives NaN or inf logits")

    def _resolutions(self, x: Tensor) -> list[str]:
        """Per resolution above the map's, the last of the outermost layers that run once before it; shallow to deep."""
        calls: list[tuple[str, tuple[int, int]]] = []
        done = False

        def note(name: str, output: object) -> None:
            nonlocal done
            done = done or name == self.layer_name
            if not done and isinstance(output, Tensor) and output.dim() == 4:
                layout = Layout.of(output, name, x.shape[2:])
                calls.append((name, (layout.height, layout.width)))

        handles = []
        try:
            for name, module in self.model.named_modules():
                handles.append(module.register_forward_hook(lambda _, __, out, name=name: note(name, out)))
            height, width = self.features(x).shape[2:]
        finally:
            for handle in handles:
                handle.remove()
        often = Counter(name for name, _ in calls)
        chosen: dict[tuple[int, int], str] = {}
        for name, size in calls:
            if often[name] > 1 or size[0] * size[1] <= height * width:
                continue
            if size not in chosen or name.count(".") <= chosen[size].count("."):
                chosen[size] = name
        return [chosen[size] for size in sorted(chosen, key=lambda size: -size[0] * size[1])]

    def _guess_num_classes(self) -> int | None:
        linear = [m for m in self.model.modules() if isinstance(m, nn.Linear)]
        return linear[-1].out_features if linear else None

    @staticmethod
    def _raise_half(tensor: Tensor) -> Tensor:
        return tensor.float() if tensor.dtype in _HALF else tensor


def _first_bad(batch: Tensor) -> str:
    """Which of a batch [B,...] is the first to hold NaN or inf, in words."""
    bad = ~torch.isfinite(batch.flatten(1)).all(1)
    return f"image {int(bad.nonzero()[0])} of the batch"
