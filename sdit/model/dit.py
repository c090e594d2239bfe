"""DiT, DTR and Switch-DiT: one backbone with three ways to scale the input of a block.

B samples, L tokens, D width, M experts of a block, T tasks, G samples whose gates are computed.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sdit.config import ModelConfig
from sdit.contracts import Dispatcher, ForwardPass, ModelOutput, Routing, TokenDispatcher
from sdit.model.balance import token_balance_loss, updated_bias
from sdit.model.block import Block, FinalLayer
from sdit.model.embedding import LabelEmbedding, PatchEmbedding, TimestepEmbedding
from sdit.model.hub import Pretrained
from sdit.model.layer import Layer, Router, TokenLayer
from sdit.model.moe.gate import gate_probabilities, sparse_gates
from sdit.model.moe.local import LocalDispatcher
from sdit.model.moe.token_local import LocalTokenDispatcher
from sdit.model.moe.token_routes import TokenStatistics
from sdit.model.rope import RotaryEmbedding
from sdit.transfers import upload


class DiffusionTransformer(nn.Module, Pretrained):
    """Predicts noise (and variance) of x (B, C, H, W) at time t for label y. The parameters have the published names."""

    pos_embed: Tensor
    channel_mask: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.x_embedder = PatchEmbedding(config.channels, width, config.patch_size)
        self.t_embedder = TimestepEmbedding(width)
        self.y_embedder = LabelEmbedding(config.classes, width) if config.classes else None
        self.feat_rope = RotaryEmbedding(config.tokens, config.head_width) if config.rope else None
        blocks = [Block(config, config.has_moe(i)) for i in range(config.depth)]
        routers = [Router(config) for _ in blocks] if config.variant == "switch" else []
        self.blocks, self.routers = nn.ModuleList(blocks), nn.ModuleList(routers)
        self.final_layer = FinalLayer(config)
        if config.positions == "sincos":
            self.register_buffer("pos_embed", torch.empty(1, config.tokens, width))
        if config.variant == "dtr":
            self.register_buffer(
                "channel_mask", torch.empty(config.timesteps, width, dtype=torch.bool), persistent=False
            )
        self.dispatcher: Dispatcher = LocalDispatcher()
        self.token_dispatcher: TokenDispatcher = LocalTokenDispatcher()
        # In a tuple the layers are not submodules, so blocks and routers keep their parameter names.
        self.layers = tuple(
            (Layer if block.moe is None else TokenLayer)(i, block, routers[i] if routers else None, self.feat_rope)
            for i, block in enumerate(blocks)
        )

    @property
    def null_label(self) -> int:
        """The label that means no class."""
        return self.config.classes

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return self.x_embedder.proj.weight.device

    @property
    def _dtype(self) -> torch.dtype:
        """The dtype of the weights and of the tokens between blocks, also under autocast."""
        return self.x_embedder.proj.weight.dtype

    @torch.no_grad()
    def move_gate_biases(self, counts: Tensor) -> None:
        """Move the biases of token gates under `balance: bias` after a step. `counts` (blocks, M): choices of each expert."""
        moe = self.config.moe
        if moe is None or moe.balance != "bias" or moe.bias_rate is None:
            return
        gates = [block.moe.gate for block in self.blocks if isinstance(block, Block) and block.moe is not None]
        biases: list[Tensor] = [bias for gate in gates if (bias := gate.e_score_correction_bias) is not None]
        moved = updated_bias(torch.stack(biases), upload(counts, self.device), moe.bias_rate)
        torch._foreach_copy_(biases, list(moved.unbind()))

    def gate_task(self, t: Tensor) -> Tensor:
        """Return the int64 task 0..T-1 of each time.

        Integer times are tasks. Continuous times in [0, 1] give floor(t T), at most T - 1.
        """
        if not t.is_floating_point():
            return t.long()
        return (t.float() * self.config.timesteps).long().clamp(0, self.config.timesteps - 1)

    def gate_probs(self, task: Tensor) -> Tensor:
        """Return the gate probabilities (depth, G, M) float32 of tasks (G,), with gradient. Without gates depth is 0."""
        return self._gate_probs(self.t_embedder(task))

    @torch.no_grad()
    def all_gate_probs(self) -> Tensor:
        """Return the gate probabilities (depth, T, M) float32 of all tasks, without gradient."""
        return self.gate_probs(torch.arange(self.config.timesteps, device=self.device))

    def forward(self, x: Tensor, t: Tensor | int | float, y: Tensor | None = None) -> ModelOutput:
        """Return prediction (B, C_out, H, W) float32 and routing for images x (B, C, H, W), times t and labels y (B,).

        t: (B,), or one value for all samples (fastest when sampling). Integers 0..T-1, or floats in [0, 1] (flow).
        """
        time = _distinct(torch.as_tensor(t, device=x.device))
        t_emb, routing, routes, forward_pass = self._route(time, len(x))
        c = t_emb
        if self.y_embedder is not None:
            assert y is not None, "a class-conditional model needs labels"
            c = c + self.y_embedder(y)
        z = self.x_embedder(x)
        if self.config.positions == "sincos":
            z = z + self.pos_embed.to(self._dtype)
        c = c.to(z.dtype)
        z, statistics, aux_loss = self._blocks(z, c, routes, forward_pass)
        return ModelOutput(self._unpatchify(self.final_layer(z, c)).float(), routing, aux_loss, statistics)

    def _blocks(
        self, z: Tensor, c: Tensor, routes: list[Tensor | None], forward_pass: ForwardPass | None
    ) -> tuple[Tensor, TokenStatistics | None, Tensor | None]:
        """Return the tokens (B, L, D) after all blocks, and statistics and loss of token-routed experts, if there are any."""
        moe = self.config.moe
        if moe is None:
            for layer, route in zip(self.layers, routes, strict=True):
                z = layer(z, c, route, forward_pass)
            return z, None, None
        tokens, found = self.token_dispatcher.forward_pass(), []
        for index, (layer, route) in enumerate(zip(self.layers, routes, strict=True)):
            if self.config.has_moe(index):
                z, *fields = layer(z, c, route, forward_pass, tokens)
                found.append(fields)
            else:
                z = layer(z, c, route, forward_pass)
        *fields, chosen = zip(*found, strict=True)
        probs, counts, served, entropy = (torch.stack(each) for each in fields)
        statistics = TokenStatistics(probs, counts, served, entropy, chosen)
        if moe.balance != "aux" or moe.aux_weight is None or not (self.training or torch.is_grad_enabled()):
            return z, statistics, statistics.probs.new_zeros(())
        loss = token_balance_loss(statistics, moe.aux_scope, tokens if self.training else None)
        return z, statistics, loss * moe.aux_weight

    def _route(self, time: Tensor, batch: int) -> tuple[Tensor, Routing, list[Tensor | None], ForwardPass | None]:
        """Return the routing of a batch.

        It consists of the time embedding (B or 1, D), the `Routing` of the B samples, the route of each layer, and the
        forward pass of the experts (None without experts).
        """
        depth, task = self.config.depth, self.gate_task(time)
        if self.config.variant != "switch":
            t_emb = self._embed_time(time)
            route = self.channel_mask[task].to(self._dtype) if self.config.variant == "dtr" else None
            nothing = t_emb.new_empty(0, batch, 0)
            return t_emb, Routing(task.expand(batch), nothing, nothing.long()), [route] * depth, None
        forward_pass = self.dispatcher.forward_pass(task.expand(batch))
        view = forward_pass.view
        task_emb = self.t_embedder(view.task)
        probs = self._gate_probs(task_emb)
        chosen = probs.topk(self.config.experts.top_k).indices if view.experts is None else view.experts
        gates = sparse_gates(probs, chosen, view.kept)
        t_emb = self._embed_time(time) if time.is_floating_point() else task_emb[view.own]
        routing = Routing(view.task[view.own], probs[:, view.own], chosen[:, view.own])
        return t_emb, routing, list(gates.unbind()), forward_pass

    def _embed_time(self, time: Tensor) -> Tensor:
        """Return the embeddings (N, D) float32 of times (N,). Continuous times are scaled by `time_scale` (by default T)."""
        if not time.is_floating_point():
            return self.t_embedder(time)
        scale = self.config.timesteps if self.config.time_scale is None else self.config.time_scale
        return self.t_embedder(time.float() * scale)

    def _gate_probs(self, task_emb: Tensor) -> Tensor:
        gates = [layer.router.gate for layer in self.layers if layer.router is not None]
        return gate_probabilities(task_emb, gates) if gates else task_emb.new_empty(0, len(task_emb), 0)

    def _unpatchify(self, patches: Tensor) -> Tensor:
        """Convert patches (B, L, p² C_out) to images (B, C_out, H, W)."""
        p, side = self.config.patch_size, self.config.side
        grid = patches.view(-1, side, side, p, p, self.config.out_channels)
        return grid.permute(0, 5, 1, 3, 2, 4).reshape(-1, self.config.out_channels, side * p, side * p)


def _distinct(t: Tensor) -> Tensor:
    """Return times (B,), or (1,) if the batch shares one expanded value."""
    t = t.reshape(-1)
    return t[:1] if t.stride(0) == 0 else t
