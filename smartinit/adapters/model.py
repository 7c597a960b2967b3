"""A model with LoRA adapters in it."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal

from torch import nn

from smartinit.adapters import combining, hotswap, kohya, merging, storage
from smartinit.adapters.adapted import AdaptedModel
from smartinit.adapters.base_bias import biases_of, show_biases
from smartinit.adapters.conversion import subtract_mutated_init
from smartinit.adapters.replication import replicate_layers
from smartinit.adapters.state import adapter_state
from smartinit.adapters.training import require_input_gradients
from smartinit.config import LoraConfig
from smartinit.errors import ArgumentError, ModelError
from smartinit.formats.tensors import stored_tensors

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator, Mapping, Sequence

    import torch

    from smartinit.adapters.combining import Combination


class LoraModel(AdaptedModel):
    """Puts LoRA layers around the target modules of ``model``, in place, and freezes the rest.

    What this class does not have itself (``config``, ``save_config``, …) is the wrapped model's.

    Args:
        model: any module with linear layers, transformers' ``Conv1D``, convolutions, embeddings or fused experts.
        config: a `smartinit.LoraConfig` or a ``peft.LoraConfig``; it is copied.
        adapter_name: name of the first adapter, which becomes the active one.
        low_cpu_mem_usage: leave the adapter's weights on the meta device until they are loaded or written.

    Attributes:
        model: the wrapped model.
        peft_config: adapter -> its `LoraConfig`.

    Raises:
        ModelError: the model already carries adapters.
        ConfigError: a combination of options that cannot be.
        TargetError: ``target_modules`` matches nothing.

        After an error the model is as it was.
    """

    def __init__(
        self, model: nn.Module, config: LoraConfig, adapter_name: str = "default", low_cpu_mem_usage: bool = False
    ) -> None:
        if not isinstance(model, nn.Module):
            raise ArgumentError(f"the model is a {type(model).__name__}; expected a torch.nn.Module")
        super().__init__(model)
        if isinstance(model, LoraModel) or getattr(model, "peft_config", None):
            raise ModelError(
                f"a {type(model).__name__} already carries adapters; add another one with model.add_adapter(name, "
                "config), or wrap the model that model.unload() returns"
            )
        self._active = [adapter_name]
        config = LoraConfig.from_any(config)
        if config.layer_replication:
            self._undo_replication = replicate_layers(model, config.layer_replication)
        try:
            self._inject(adapter_name, config, low_cpu_mem_usage=low_cpu_mem_usage)
        except BaseException:
            self._restore_layers()
            raise
        for parameter in self._trainable:
            parameter.requires_grad = False
        self.set_adapter(adapter_name)
        require_input_gradients(model)

    # -- into the base weights ----------------------------------------------------------------------------------------

    def merge_adapter(self, adapter_names: Sequence[str] | None = None, safe_merge: bool = False) -> None:
        """Add adapters into the base weights, for inference without their cost; `unmerge_adapter` undoes it.

        Adapters that are merged already stay so, with a warning. A weight that layers with different updates share
        (tied embeddings, replicated layers) is untied while it is merged, with a warning.

        Args:
            adapter_names: which, in this order; None: the active ones.
            safe_merge: check the new weights for NaN and Inf, and change none of them if there are any.

        Raises:
            UnknownNameError: there is no such adapter.
            ArgumentError: a string instead of a list of names.
            ConfigError: an adapter with a bias on a layer without one.
            ModelError: a weight that cannot be changed (quantised, offloaded), or (``safe_merge``) would not be finite.
                After any error, Ctrl-C included, the model is as it was.

        Cost: a matrix product per layer, and the host's memory for a copy of every changed weight.
        """
        names = self._merged_names(adapter_names)
        show_biases(self.model, self._with_biases(self._active, names))  # first: a merge may add to them
        try:
            merging.merge_adapters(self.model, names, safe_merge=safe_merge)
        finally:
            self._show_biases()

    def unmerge_adapter(self) -> None:
        """Take all merged adapters out of the base weights, which are then bit for bit what they were."""
        merging.unmerge_adapters(self.model)
        self._show_biases()

    def merge_and_unload(
        self, progressbar: bool = False, safe_merge: bool = False, adapter_names: Sequence[str] | None = None
    ) -> nn.Module:
        """The wrapped model with adapters in its weights and without adapter parts, trainable as it was before.

        Trained copies of whole modules take the originals' places. A weight that is untied (see `merge_adapter`) stays
        so, and the model's configuration then says ``tie_word_embeddings=False``.

        Args:
            progressbar: show one, over layers.
            safe_merge: as of `merge_adapter`.
            adapter_names: as of `merge_adapter`.

        Raises:
            As `merge_adapter`.
        """
        names = self._merged_names(adapter_names)
        with self._biases_for_good(names):
            merging.merge_into(
                self.model, names, safe_merge=safe_merge, progressbar=progressbar, trainable=self._trainable
            )
        self._forget_adapters()
        return self.model

    def add_weighted_adapter(
        self,
        adapters: Sequence[str],
        weights: Sequence[float],
        adapter_name: str,
        combination_type: Combination = "svd",
        svd_rank: int | None = None,
        svd_clamp: float | None = None,
        svd_full_matrices: bool = True,
        svd_driver: str | None = None,
        density: float | None = None,
        majority_sign_method: Literal["total", "frequency"] = "total",
    ) -> None:
        """Add a new adapter that combines others; it has scaling 1 and is neither active nor trainable.

        ``cat`` and ``svd`` add up what the adapters do, ``Σ wᵢ sᵢ Bᵢ Aᵢ``: exactly, with the sum of their ranks, or as
        the best approximation of one rank. ``linear`` adds up A's and B's on their own. The others drop entries first,
        of A and B, or with ``_svd`` of the dense products: the smallest (``magnitude_prune``), then also those of the
        lighter sign (``ties``, arXiv 2306.01708), or random ones by torch's global generator (``dare_linear``,
        ``dare_ties``, arXiv 2311.03099). One adapter alone is only scaled. More in `smartinit.adapters.combining`.

        Args:
            adapters: names of those to combine.
            weights: one finite number each, negative ones too.
            adapter_name: a new name.
            combination_type: see above.
            svd_rank: rank of what ``svd`` and ``…_svd`` give; None: the adapters' largest. At most what a layer has.
            svd_clamp: share, above 0.5, of the entries of ``U Σ`` and ``Vᵀ``, each taken with both signs, that lie
                below the limit to which all are clamped.
            svd_full_matrices: without effect: what it adds to a decomposition is never used.
            svd_driver: cuSOLVER's routine for ``…_svd`` on CUDA: the decomposition is dense then. Else without effect.
            density: share of the entries that is kept, in (0, 1], for the types that drop any.
            majority_sign_method: whether a sign is elected by the sum of the entries (``"total"``) or their number.

        Raises:
            UnknownNameError: there is no such adapter.
            ConfigError: an option that cannot be; different ranks where A's and B's are added; adapters that cannot be
                combined.
            ArgumentError: an argument of the wrong kind.
            ModelError: weights that are not finite or not loaded yet.

            After an error the model is as it was.

        Cost per layer: ``svd`` O((out + in)·q²), q the sum of the ranks; ``…_svd`` about five dense matrices (with
        elected signs one more per adapter) and a truncated decomposition; the others one pass over A and B.
        """
        combining.add_weighted_adapter(
            self,
            adapters,
            weights,
            adapter_name,
            combination_type,
            svd_rank=svd_rank,
            svd_clamp=svd_clamp,
            svd_full_matrices=svd_full_matrices,
            svd_driver=svd_driver,
            density=density,
            majority_sign_method=majority_sign_method,
        )

    # -- files --------------------------------------------------------------------------------------------------------

    def save_pretrained(
        self,
        folder: str | os.PathLike[str],
        path_initial_model_for_weight_conversion: str | None = None,
        selected_adapters: Sequence[str] | None = None,
    ) -> None:
        """Write adapters as PEFT folders: ``default`` into ``folder``, others into sub-folders of their name.

        A folder holds what the adapter trains: matrices and magnitudes, whole modules, rows of embeddings, biases; of
        the base model nothing, embeddings with adapters included. Every file is written in one step.

        An adapter that was applied with ``base="offset"`` is written as plain LoRA for the base as it is. One whose
        base gave its start up keeps that start in the sub-folder ``start`` and names no base model; nor does one beside
        it, which a warning tells. The start of an adapter that is written over is removed.

        Args:
            folder: where to.
            path_initial_model_for_weight_conversion: the folder that training started from: what is written is then
                plain LoRA of twice the rank for the unmodified base, see `smartinit.convert.convert_adapter`.
            selected_adapters: which; None: all.

        Raises:
            OutputError: the folder cannot be written, or an adapter of its own is in the start's place.
            ArtefactError: the start is for another model or other layers.
            ModelError: the adapter has no values yet (``low_cpu_mem_usage``).
            UnknownNameError: there is no such adapter; nothing was written.
            VerificationError: a matrix or magnitude is not finite.
        """
        self._require_adapters()
        storage.save(self, folder, path_initial_model_for_weight_conversion, selected_adapters)

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        folder: str | os.PathLike[str],
        adapter_name: str = "default",
        is_trainable: bool = False,
        low_cpu_mem_usage: bool = False,
    ) -> LoraModel:
        """Wrap ``model`` with the adapter in a PEFT folder.

        The folder's ``default`` only: `load_adapter` adds others from their sub-folders. Values go into the dtype that
        a new adapter has here: float32, or float64 beside float64 weights. Where PEFT has saved embeddings of the base
        model as well, they must be those that this model has; the base is never written to.

        Args:
            model: the base model.
            folder: the adapter folder.
            adapter_name: what to call it here.
            is_trainable: whether to train it; else it is frozen.
            low_cpu_mem_usage: without effect: nothing that the file replaces is made, and it is in memory once.

        Raises:
            MissingFileError: there is no such folder.
            ArtefactError: the folder is no adapter, or one for another model or for a base that PEFT splits again; what
                is missing, has no place, another shape or NaN is named. ``model`` is then as it was.
        """
        del low_cpu_mem_usage
        return storage.from_pretrained(cls, model, folder, adapter_name, is_trainable=is_trainable)

    def load_adapter(
        self,
        folder: str | os.PathLike[str],
        adapter_name: str = "default",
        is_trainable: bool = False,
        low_cpu_mem_usage: bool = False,
    ) -> None:
        """Add the adapter in a PEFT folder under a new name; arguments as of `from_pretrained`.

        Raises:
            ConfigError: the name is taken.
            ArtefactError: the folder is no adapter, or one for another model; this model is then as it was.
        """
        del low_cpu_mem_usage
        storage.load_adapter(self, folder, adapter_name, is_trainable=is_trainable)

    def save_kohya(
        self,
        file: str | os.PathLike[str],
        adapter_name: str = "default",
        prefix: str = "lora_unet",
        *,
        dtype: torch.dtype | None = None,
        others: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        """Write an adapter of an image model with kohya's names; see `smartinit.formats.kohya`.

        Args:
            file: where to, a safetensors file.
            adapter_name: which.
            prefix: which model this is: ``"lora_unet"``, or ``"lora_te"`` and the like for text encoders.
            dtype: of the matrices in the file; None: what they have.
            others: what `smartinit.formats.kohya.kohya_tensors` gives for other models, to stand in the same file.

        Raises:
            UnknownNameError: there is no such adapter.
            ConfigError: it has more than matrices and magnitudes, adapts embeddings, or was split from its base.
            OutputError: the file cannot be written.
            VerificationError: a value is not finite.
        """
        kohya.save_kohya(self, file, adapter_name, prefix, dtype=dtype, others=others)

    def load_kohya(
        self,
        file: str | os.PathLike[str],
        adapter_name: str,
        prefix: str = "lora_unet",
        is_trainable: bool = False,
    ) -> None:
        """Add the adapter in a file with kohya's names under a new name; arguments as of `save_kohya`.

        Raises:
            ConfigError: the name is taken.
            MissingFileError: there is no such file.
            ArtefactError: it cannot be read, or does not fit; this model is then as it was.
        """
        kohya.load_kohya(self, file, adapter_name, prefix, is_trainable=is_trainable)

    def prepare_for_hotswap(self, target_rank: int) -> None:
        """Make room for adapters of up to ``target_rank``, before the model is compiled; see `hotswap_adapter`.

        All adapters are widened with zeros, which changes no output: their parameters are new ones, and from then on
        they are adapters of that rank, with the alphas that keep their scalings; so they are saved, too. Adapters on
        bare parameters keep their rank.

        Args:
            target_rank: the largest rank of all adapters to come.

        Raises:
            ConfigError: an adapter has a larger rank or is merged, or the model is compiled; nothing was changed.
        """
        hotswap.prepare_for_hotswap(self, target_rank)

    def hotswap_adapter(self, folder: str | os.PathLike[str], adapter_name: str = "default") -> None:
        """Replace an adapter's weights by those in a PEFT folder, in place: compiled code stays valid.

        Ranks and alphas may differ from the adapter's here, after `prepare_for_hotswap`. Layers that the new adapter
        lacks add nothing from then on; dropout and what is trained stay as they were.

        Args:
            folder: the new adapter.
            adapter_name: the one to replace; it keeps its name.

        Raises:
            UnknownNameError: there is no such adapter to replace.
            ConfigError: it is merged; or either of the two was split from its base.
            ArtefactError: the folder is no adapter, or does not fit: a layer that this one lacks, a larger rank, other
                options. The adapter is then as it was.
        """
        hotswap.hotswap_adapter(self, folder, adapter_name)

    def subtract_mutated_init(
        self,
        output_state_dict: dict[str, torch.Tensor],
        adapter_name: str,
        kwargs: object = None,
    ) -> dict[str, torch.Tensor]:
        """A trained split as plain LoRA of twice the rank, in memory: see `smartinit.adapters.conversion`.

        Args:
            output_state_dict: the trained adapter, by the keys of its file.
            adapter_name: an adapter of this model that still is as it was before the training.
            kwargs: as in PEFT's signature; not used.

        Raises:
            UnknownNameError: there is no such adapter.
            ArtefactError: the two are for different layers.
        """
        del kwargs
        config = self.config_of(adapter_name)
        layers = {name: layer for name, layer in self.lora_layers().items() if layer.has(adapter_name)}
        state = adapter_state(layers, adapter_name, plain=False)
        return subtract_mutated_init(
            output_state_dict, stored_tensors(state.factors, dtype=None, forms=state.forms), config
        )

    # -- details ------------------------------------------------------------------------------------------------------

    def _merged_names(self, adapter_names: Sequence[str] | None) -> list[str]:
        if isinstance(adapter_names, str):
            raise ArgumentError(f"adapter_names={adapter_names!r} is no list of names; write [{adapter_names!r}]")
        names = list(self._active if adapter_names is None else adapter_names)
        for name in names:
            self.config_of(name)
        merged = [name for part in self.parts().values() for name in part.merged_adapters]
        for part in self.parts().values():
            part.check_active([*merged, *names])
        return names

    @contextmanager
    def _biases_for_good(self, adapter_names: Sequence[str]) -> Iterator[None]:
        """Leave the biases of one of these adapters in the model, which loses its parts inside."""
        merged = [name for part in self.parts().values() for name in part.merged_adapters]
        biases = biases_of(self.model).values()
        show_biases(self.model, [*merged, *adapter_names])
        try:
            yield
        except BaseException:
            self._show_biases()
            raise
        trainable = {id(parameter) for parameter in self._trainable}
        for trained, original in (pair for one in biases for pair in one.originals()):
            trained.requires_grad_(id(original) in trainable)
