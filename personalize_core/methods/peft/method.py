"""Any adapter of PEFT's library on layers of the U-Net, trained as DreamBooth is.

Mangrulkar et al., "PEFT: State-of-the-art Parameter-Efficient Fine-Tuning methods", github.com/huggingface/peft. What
an adapter starts from and computes is PEFT's own code; here it meets a base model of which no bit may change, and what
it learns becomes plain tensors.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor, nn

from personalize_core.base_model.model import BaseModel
from personalize_core.concepts.concept import Concept
from personalize_core.concepts.images import ConceptLatents
from personalize_core.errors import InputError, listed, said_by, shown
from personalize_core.files.atomic import save_tensors, write_json
from personalize_core.files.outside import read_json_object
from personalize_core.files.typed_yaml import build
from personalize_core.methods.interface import Batch, Method, Stage
from personalize_core.methods.peft.peft_options import MISSING
from personalize_core.methods.peft.recipe import Config
from personalize_core.methods.shared.interchange import file_in, fill, read_tensors
from personalize_core.methods.shared.lag import attached
from personalize_core.methods.shared.layer_modules import computing, path_of, stored
from personalize_core.methods.shared.training_batches import with_prior

TEMPLATE = "a photo of {}"
TARGETS = ("to_q", "to_k", "to_v", "to_out.0")  # the attention projections, unless config.target_modules says otherwise
FOLDER, WEIGHTS, ABOUT, IN_PEFT = "peft", "adapter_model.safetensors", "adapter_config.json", "base_model.model."
NAME = "default"  # PEFT's, of an adapter that is the only one


@dataclass(frozen=True)
class Kind:
    """What `adapter` in the recipe stands for."""

    of: str  # PEFT's type
    sets: Mapping[str, Any] = field(default_factory=dict)  # what makes it this kind
    fills: Mapping[str, Any] = field(default_factory=dict)  # where PEFT's default is none, or none for a U-Net


KINDS = {
    "lora": Kind("LORA"),
    "rslora": Kind("LORA", {"use_rslora": True}),
    "dora": Kind("LORA", {"use_dora": True}),
    "pissa": Kind("LORA", {"init_lora_weights": "pissa"}),
    "olora": Kind("LORA", {"init_lora_weights": "olora"}),
    "loha": Kind("LOHA"),
    "lokr": Kind("LOKR"),
    "oft": Kind("OFT"),
    "boft": Kind("BOFT"),
    "hra": Kind("HRA"),
    "vera": Kind("VERA", {"save_projection": False}),  # drawn anew from its key
    "randlora": Kind("RANDLORA", {"save_projection": False}),
    "delora": Kind("DELORA"),
    "gralora": Kind("GRALORA"),
    "miss": Kind("MISS", fills={"r": 8}),  # its 64 is more than the narrowest layers have
    "ia3": Kind("IA3", fills={"feedforward_modules": []}),  # every output is scaled, no input
}


class Adapter:
    """PEFT's modules for some layers; outside of `holding` they hold no weights of the base model or of a method.

    They are put around copies of the layers, with which PEFT may do what it likes.

    Args:
        about: PEFT's configuration.
        layers: path -> layer of the U-Net.
        weights: path -> its weight as the checkpoint has it, float32, on the CPU.

    Raises:
        InputError: PEFT refuses this adapter for these layers.
    """

    def __init__(self, about: Any, layers: Mapping[str, nn.Module], weights: Mapping[str, Tensor]) -> None:
        from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING

        self.root = nn.Module()
        for path, layer in layers.items():
            _put(self.root, path, _copy_of(layer, weights[path]))
        try:
            PEFT_TYPE_TO_TUNER_MAPPING[about.peft_type](self.root, about, NAME)
        except (ValueError, TypeError, AssertionError, KeyError, NotImplementedError) as error:
            raise InputError(f"PEFT refuses this adapter: {said_by(error)}") from None
        self.modules: dict[str, Any] = {path: self.root.get_submodule(path) for path in layers}
        self._copies: dict[str, Any] = {path: module.get_base_layer() for path, module in self.modules.items()}
        self.start: dict[str, Tensor] = {}  # name -> what each learned tensor starts from
        self._learned: list[tuple[dict[str, Any], str, str]] = []  # where a learned tensor is, and its name
        self._fixed: list[tuple[dict[str, Any], str, Tensor]] = []  # what follows from the configuration
        self._find()
        self.moved = any(not torch.equal(copy.weight, weights[path]) for path, copy in self._copies.items())
        for store, leaf, _ in [*self._learned, *self._fixed, *self._of_copies(layers)]:
            store[leaf] = None

    def _find(self) -> None:
        copies, names = set(self._copies.values()), dict[int, str]()
        for path, module in self.root.named_modules():
            for store in (module._parameters, module._buffers) if module not in copies else ():
                for leaf, tensor in store.items():
                    if tensor is None:
                        continue
                    if not tensor.requires_grad:
                        self._fixed.append((store, leaf, tensor))
                        continue
                    name = names.setdefault(id(tensor), f"{path}.{leaf}")  # several layers may share one
                    self._learned.append((store, leaf, name))
                    self.start[name] = tensor.detach()

    def _of_copies(self, layers: Mapping[str, nn.Module]) -> list[tuple[dict[str, Any], str, Tensor]]:
        return [
            (self._copies[path]._parameters, leaf, weight)
            for path, layer in layers.items()
            for leaf, weight in layer._parameters.items()
            if weight is not None
        ]

    @contextmanager
    def holding(
        self,
        learned: Mapping[str, Tensor],
        layers: Mapping[str, nn.Module],
        device: torch.device,
        weights: Mapping[str, Tensor] | None = None,
    ) -> Iterator[None]:
        """Within it the modules compute: with these learned tensors, around these layers.

        Args:
            weights: path -> what stands for the layer's weight; by default the weight.
        """
        entries = [(store, leaf, learned[name]) for store, leaf, name in self._learned]
        entries += [(store, leaf, tensor.to(device)) for store, leaf, tensor in self._fixed]
        entries += self._of_copies(layers)
        entries += [(self._copies[path]._parameters, "weight", each) for path, each in (weights or {}).items()]
        before = [(store, leaf, store[leaf]) for store, leaf, _ in entries]
        try:
            for store, leaf, tensor in entries:
                store[leaf] = tensor
            yield
        finally:
            for store, leaf, tensor in reversed(before):
                store[leaf] = tensor

    def names_in_files(self, learned: Mapping[str, Tensor]) -> dict[str, str]:
        """PEFT's name of each learned tensor -> ours."""
        from peft.utils.save_and_load import get_peft_model_state_dict

        ours = {id(tensor): name for name, tensor in learned.items()}
        found = get_peft_model_state_dict(self.root, dict(learned), save_embedding_layers=False)
        return {f"{IN_PEFT}{name}": ours[id(tensor)] for name, tensor in found.items()}


class PEFTAdapter(Method):
    """An adapter of PEFT's on layers of the U-Net; the placeholder reads a rare word's embedding.

    PiSSA and OLoRA start from a part of each weight, W, and leave the rest of it, W - s B_0 A_0, to the layer. That
    rest is computed where it is needed, and B_0 and A_0 are kept with what is learned.
    """

    Config = Config

    def __init__(self, config: Config, base: BaseModel, concept: Concept) -> None:
        super().__init__(config, base, concept)
        about, restored = described(config), torch.get_default_device().type == "meta"
        layers, moves = targeted(base, about), _moves_weights(about)
        if restored and moves:
            about.init_lora_weights = True  # no start is looked for where one is read from a file
        # PEFT computes some of what it keeps, so its modules hold numbers even where a method's tensors need none.
        with torch.device("cpu"), torch.random.fork_rng(devices=[]) if restored else nullcontext():
            reads = _reads_weights(about)
            weights: dict[str, Tensor] = {
                path: _weight(base, path, layer).cpu() if reads else torch.zeros(layer.weight.shape)
                for path, layer in layers.items()
            }
            self.adapter = Adapter(about, layers, weights)
        if self.adapter.moved and not moves:
            raise InputError(
                f"adapter: {config.adapter} changes the base model's weights in a way that is not known here"
            )
        self.learned = nn.ParameterDict({stored(name): nn.Parameter(each) for name, each in self.adapter.start.items()})
        self.first = nn.Module()
        for name, each in self.adapter.start.items() if moves else ():
            self.first.register_buffer(stored(name), each.clone())
        self.adapter.start.clear()

    def stages(self) -> list[Stage]:
        c = self.config
        return [Stage("adapter", c.steps, c.batch_size, [{"params": list(self.parameters()), "lr": c.lr}])]

    def batch(self, images: ConceptLatents, size: int, generator: Generator) -> Batch:
        c = self.config
        return with_prior(self, TEMPLATE, images, size, generator, c.prior_weight if c.prior_preservation else None)

    @contextmanager
    def attach(self, base: BaseModel) -> Iterator[None]:
        if not self.training:
            self.config.check(self.sampling)  # an imported artifact may have other targets than params.yaml
        modules = self.adapter.modules
        layers = {path: base.unet.get_submodule(path) for path in modules}
        inside = {
            path: transformer for transformer in base.transformers for path in layers if _lies_in(path, transformer)
        }

        def within(transformer: str | None) -> Any:
            return computing(
                {layers[path]: modules[path].forward for path in layers if inside.get(path) == transformer}
            )

        self.adapter.root.train(self.training)
        with ExitStack() as stack:
            rest = self._rest(base, layers)
            stack.enter_context(self.adapter.holding(self._tensors(), layers, base.device, rest))
            stack.enter_context(within(None))
            stack.enter_context(attached(base, self, within))
            yield

    def _tensors(self) -> dict[str, Tensor]:
        return {path_of(name): each for name, each in self.learned.items()}

    @torch.no_grad()
    def _rest(self, base: BaseModel, layers: Mapping[str, nn.Module]) -> dict[str, Tensor]:
        """W - s B_0 A_0 of each layer, where the adapter started from s B_0 A_0; else nothing."""
        first = {path_of(name): each for name, each in self.first.named_buffers()}
        if not first:
            return {}
        with self.adapter.holding(first, layers, base.device):
            parts = {path: module.get_delta_weight(NAME) for path, module in self.adapter.modules.items()}
        whole: dict[str, Any] = {path: _weight(base, path, layer) for path, layer in layers.items()}
        return {
            path: (whole[path].to(part.device) - part).to(layers[path].weight.dtype) for path, part in parts.items()
        }

    def export(self, base: BaseModel, folder: Path) -> str:
        about, tensors = described(self.config), self._tensors()
        files = {name: tensors[own] for name, own in self.adapter.names_in_files(tensors).items()}
        if _moves_weights(about):
            about, files = self._as_lora(about, files)
        if isinstance(about.target_modules, str) or isinstance(getattr(about, "exclude_modules", None), str):
            about.target_modules, about.exclude_modules = list(self.adapter.modules), None
        save_tensors(folder / FOLDER / WEIGHTS, {name: each.detach() for name, each in files.items()})
        write_json(
            folder / FOLDER / ABOUT, _as_values(about) | {"peft_type": about.peft_type.value, "inference_mode": True}
        )
        said = f"{base.tokenizer.rare_word} {self.concept.class_noun}"
        return f'pipe.unet = PeftModel.from_pretrained(pipe.unet, "{FOLDER}"), and write {said!r} in prompts.'

    def _as_lora(self, about: Any, files: Mapping[str, Tensor]) -> tuple[Any, dict[str, Tensor]]:
        """s (B A - B_0 A_0) as a low-rank change of twice the rank, for which no weight has to be changed before."""
        if about.use_dora or about.rank_pattern or about.alpha_pattern:
            raise InputError(
                "PEFT can load a start from the weights without DoRA and patterns alone: cannot be exported"
            )
        s = about.lora_alpha / (about.r**0.5 if about.use_rslora else about.r)
        first = {path_of(name): each for name, each in self.first.named_buffers()}
        found: dict[str, Tensor] = {}
        for name, own in self.adapter.names_in_files(self._tensors()).items():
            A_or_B = files[name], first[own]
            found[name] = torch.cat(A_or_B) if "lora_A" in name else s * torch.cat([A_or_B[0], -A_or_B[1]], dim=1)
        rank = 2 * about.r
        return dataclasses.replace(about, r=rank, lora_alpha=rank, use_rslora=False, init_lora_weights=True), found

    @classmethod
    def imported(cls, config: Config, base: BaseModel, concept: Concept, path: Path) -> PEFTAdapter:
        """PEFT's folder, or one with it in "peft": whichever of the kinds it holds becomes the recipe's."""
        if path.is_file():
            raise InputError(
                f"{path} is one file, and PEFT saves an adapter as a folder, {ABOUT} beside {WEIGHTS}: name the "
                "folder; a LoRA in a file of its own is one of lora_dreambooth"
            )
        folder = path / FOLDER if (path / FOLDER).is_dir() else path
        tensors, about = read_tensors(file_in(folder, WEIGHTS)), read_json_object(file_in(folder, ABOUT))
        adapter, options = read_kind(about, folder)
        chosen = build(Config, dataclasses.asdict(config) | {"adapter": adapter, "config": options}, str(folder))
        method = cls(chosen, base, concept)
        ours = {name: stored(own) for name, own in method.adapter.names_in_files(method._tensors()).items()}
        fill(method.learned.items(), {ours.get(name, name): each.float() for name, each in tensors.items()}, folder)
        return method


def described(config: Config) -> Any:
    """PEFT's configuration of the adapter.

    Raises:
        InputError: PEFT is not installed, or it refuses these options together.
    """
    try:
        from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PeftType
    except ModuleNotFoundError as error:
        raise InputError(MISSING) from error
    kind = KINDS[config.adapter]
    if again := sorted(kind.sets.keys() & config.config.keys()):
        raise InputError(f"adapter: {config.adapter} itself says what {listed(again)} is; take it out of config")
    options = {"target_modules": list(TARGETS), **kind.fills, **kind.sets, **config.config}
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Specified to not save")  # of VeRA and RandLora: as it shall be
            return PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(kind.of)](**options)
    except (ValueError, TypeError) as error:
        raise InputError(f"PEFT refuses config: {said_by(error)}") from None


def targeted(base: BaseModel, about: Any) -> dict[str, Any]:
    """Path in the U-Net -> layer, of those that target_modules names.

    Raises:
        InputError: it names none, a name is no layer's, or something else than a linear layer or a convolution.
    """
    from peft.tuners.tuners_utils import check_target_module_exists

    modules = dict(base.unet.named_modules())
    found = {path: module for path, module in modules.items() if path and check_target_module_exists(about, path)}
    names = [] if isinstance(about.target_modules, str) else sorted(about.target_modules)
    idle = [name for name in names if not any(f".{path}".endswith(f".{name}") for path in modules)]
    if idle or not found:
        raise InputError(
            f"config.target_modules = {shown(idle or about.target_modules)} names no layer of this U-Net; its layers "
            f"are called as the ends of paths such as {base.blocks_of()[0].path}.attn2.to_k"
        )
    others = [f"{path}, a {type(module).__name__}" for path, module in found.items() if not _can_be_adapted(module)]
    if others:
        raise InputError(
            f"config.target_modules names {listed(others, 3)}; adapters change linear layers and convolutions"
        )
    return found


def read_kind(about: Mapping[str, Any], folder: Path) -> tuple[Any, dict[str, Any]]:
    """What a configuration in a file of PEFT's is in a recipe: `adapter`, and `config`.

    Raises:
        InputError: it is of a kind that cannot be imported.
    """
    of = about.get("peft_type")
    kinds = {name: kind for name, kind in KINDS.items() if kind.of == of}
    fitting = [name for name, kind in kinds.items() if all(about.get(key) == value for key, value in kind.sets.items())]
    if not fitting:
        raise InputError(f"{folder} holds an adapter of type {shown(of)}, of which none can be imported")
    adapter = max(fitting, key=lambda name: len(KINDS[name].sets))
    plain = described(build(Config, {"adapter": adapter}, str(folder)))
    usual = _as_values(plain)
    about_files = ("peft_type", "task_type", "auto_mapping", "peft_version", "inference_mode", "revision")
    options = {
        key: sorted(value) if key == "target_modules" and isinstance(value, list) else value
        for key, value in about.items()
        if key not in (*about_files, "base_model_name_or_path") and key not in KINDS[adapter].sets
    }
    if isinstance(options.get("target_modules"), str) or isinstance(options.get("exclude_modules"), str):
        raise InputError(f"{folder} names its layers by a pattern; save it with a list of target_modules")
    return adapter, {key: value for key, value in options.items() if value != usual.get(key)}


def _as_values(about: Any) -> dict[str, Any]:
    """PEFT's configuration as JSON holds it."""
    return {key: sorted(value) if isinstance(value, set) else value for key, value in about.to_dict().items()}


def _moves_weights(about: Any) -> bool:
    """Does it start from a part of the layers' weights?"""
    start = str(getattr(about, "init_lora_weights", ""))
    return start == "olora" or start.startswith("pissa")


def _reads_weights(about: Any) -> bool:
    """May it start from what the layers' weights are? Not a plain LoRA; their copies to the CPU take a while."""
    return about.peft_type.value != "LORA" or about.use_dora or about.init_lora_weights not in (True, False, "gaussian")


def _can_be_adapted(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | nn.Conv2d)


def _weight(base: BaseModel, path: str, layer: Any) -> Tensor:
    """A layer's weight as the checkpoint has it, float32."""
    return base.unrounded.get(f"{path}.weight", layer.weight).detach()


def _copy_of(layer: Any, weight: Tensor) -> nn.Module:
    """A layer of the same shape around another tensor, with a bias where the layer has one."""
    bias = layer.bias is not None
    if isinstance(layer, nn.Linear):
        copy: Any = nn.Linear(layer.in_features, layer.out_features, bias, device="meta")
    else:
        shape = (layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding, layer.dilation)
        copy = nn.Conv2d(*shape, layer.groups, bias, layer.padding_mode, device="meta")
    copy.weight = nn.Parameter(weight.clone(), requires_grad=False)  # which PEFT may write to
    return copy


def _put(root: nn.Module, path: str, layer: nn.Module) -> None:
    """Make it `root`'s submodule of that path."""
    *parents, leaf = path.split(".")
    for name in parents:
        if name not in root._modules:
            root.add_module(name, nn.Module())
        root = root.get_submodule(name)
    root.add_module(leaf, layer)


def _lies_in(path: str, parent: str) -> bool:
    return path.startswith(f"{parent}.")
