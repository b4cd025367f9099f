"""Extraction: everything a trainer needs of the base model, computed once per wording.

One ordinary forward of the frozen model over prompt + target gives, at the tokens that predict the target (the last
prompt token and every target token but the last), the key activation A(x) entering W_v of layer L and the residual
stream leaving the layer; and, for the layers above, the prompt's keys and values. None of it changes during training,
because the side memory acts only from the last prompt token on. The paper's procedure acts on the whole prompt: with
`whole_prompt` every prompt token is treated like a target token that is not predicted, and there is no past.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from pipeline.models.base_model import BaseModel
from pipeline.models.capture import capture
from pipeline.models.suffix import PastKeyValues
from pipeline.training.shared_prefixes import Prefixes, read_prefixes
from pipeline.training.tokens import Wording

IGNORED = -100  # label of padding, as in torch's cross entropy


@dataclass(frozen=True)
class Activations:
    """N wordings, padded to T target tokens (right) and P prompt tokens before the last one (left)."""

    states_ND: Tensor  # at the last prompt token, entering layer L: what the router reads
    keys_NTF: Tensor
    hidden_NTD: Tensor
    labels_NT: Tensor  # token to predict, IGNORED where padded
    positions_NT: Tensor
    past: PastKeyValues  # per suffix layer: N × heads × P × head_dim
    past_mask_NP: Tensor

    def __len__(self) -> int:
        return len(self.labels_NT)

    def select(self, index_B: Tensor) -> "Activations":
        return Activations(
            states_ND=self.states_ND[index_B],
            keys_NTF=self.keys_NTF[index_B],
            hidden_NTD=self.hidden_NTD[index_B],
            labels_NT=self.labels_NT[index_B],
            positions_NT=self.positions_NT[index_B],
            past=[(key[index_B], value[index_B]) for key, value in self.past],
            past_mask_NP=self.past_mask_NP[index_B],
        )

    def trimmed(self) -> "Activations":
        """Without the padding that no row needs; at least one target and one prompt token stay."""
        T = max(1, int((self.labels_NT != IGNORED).sum(dim=1).max())) if len(self) else 1
        P = max(1, int(self.past_mask_NP.sum(dim=1).max())) if self.past_mask_NP.numel() else 0
        first = self.past_mask_NP.shape[1] - P
        return Activations(
            states_ND=self.states_ND,
            keys_NTF=self.keys_NTF[:, :T],
            hidden_NTD=self.hidden_NTD[:, :T],
            labels_NT=self.labels_NT[:, :T],
            positions_NT=self.positions_NT[:, :T],
            past=[(key[:, :, first:], value[:, :, first:]) for key, value in self.past],
            past_mask_NP=self.past_mask_NP[:, first:],
        )

    def target_keys_MF(self, where_NT: Tensor | None = None) -> Tensor:
        """A(x) at every token that predicts a target, padding left out; with `where_NT`, at those alone."""
        targets_NT = self.labels_NT != IGNORED
        return self.keys_NTF[targets_NT if where_NT is None else targets_NT & where_NT]

    def to(self, device: torch.device) -> "Activations":
        return Activations(
            states_ND=self.states_ND.to(device),
            keys_NTF=self.keys_NTF.to(device),
            hidden_NTD=self.hidden_NTD.to(device),
            labels_NT=self.labels_NT.to(device),
            positions_NT=self.positions_NT.to(device),
            past=[(key.to(device), value.to(device)) for key, value in self.past],
            past_mask_NP=self.past_mask_NP.to(device),
        )


class PromptStates(NamedTuple):
    """What the router sees of prompts, and what the unedited model would answer."""

    states_ND: Tensor  # at the last token, entering layer L
    answers_N: Tensor  # the most likely next token
    confidence_N: Tensor  # its probability


@torch.no_grad()
def extract(
    base: BaseModel, wordings: Sequence[Wording], *, whole_prompt: bool = False, batch: int = 64
) -> Activations:
    """Activations of the wordings, in their order, float32 on the CPU. Those of about one length meet in a batch, and
    the same wordings always in the same batches, so that they give the same bytes. With `whole_prompt` rows begin with
    their prompt's first token and `past` is empty."""

    def length(index: int) -> int:
        return len(wordings[index].prompt_ids) - (0 if whole_prompt else wordings[index].shared)

    by_length = sorted(range(len(wordings)), key=length)
    batches = [
        [wordings[index] for index in by_length[start : start + batch]] for start in range(0, len(wordings), batch)
    ]
    if whole_prompt:
        parts = [_extract_whole(base, chosen) for chosen in batches]
    else:
        prefixes = read_prefixes(base, wordings)
        parts = [_extract_batch(base, chosen, prefixes) for chosen in batches]
    return joined(parts).select(torch.tensor(by_length).argsort())


def joined(parts: Sequence[Activations]) -> Activations:
    """The wordings of all parts, one after another, padded alike."""
    T = max(part.labels_NT.shape[1] for part in parts)
    P = max(part.past_mask_NP.shape[1] for part in parts)
    padded = [_pad(part, T=T, P=P) for part in parts]
    return Activations(
        states_ND=torch.cat([part.states_ND for part in padded]),
        keys_NTF=torch.cat([part.keys_NTF for part in padded]),
        hidden_NTD=torch.cat([part.hidden_NTD for part in padded]),
        labels_NT=torch.cat([part.labels_NT for part in padded]),
        positions_NT=torch.cat([part.positions_NT for part in padded]),
        past=[
            (torch.cat([key for key, _ in layer]), torch.cat([value for _, value in layer]))
            for layer in zip(*(part.past for part in padded), strict=True)
        ],
        past_mask_NP=torch.cat([part.past_mask_NP for part in padded]),
    )


@torch.no_grad()
def read_prompts(base: BaseModel, prompts: Sequence[tuple[int, ...]], *, batch: int = 64) -> PromptStates:
    """One forward of the unedited model over prompts that have no target, the short ones together."""
    states, answers, confidence = [], [], []
    by_length = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    for start in range(0, len(prompts), batch):
        chosen = [prompts[index] for index in by_length[start : start + batch]]
        longest = max(map(len, chosen))
        ids_BT = torch.full((len(chosen), longest), base.tokenizer.pad_token_id)
        mask_BT = torch.zeros_like(ids_BT)
        for row, prompt in enumerate(chosen):
            ids_BT[row, longest - len(prompt) :] = torch.tensor(prompt)
            mask_BT[row, longest - len(prompt) :] = 1
        with capture(base) as captured:
            output = base.model(
                input_ids=ids_BT.to(base.device),
                attention_mask=mask_BT.to(base.device),
                position_ids=(mask_BT.cumsum(dim=1) - 1).clamp(min=0).to(base.device),
                use_cache=False,
                logits_to_keep=1,
            )
        states.append(captured.states_BTD[:, -1].float().cpu())
        top = output.logits[:, -1].float().softmax(dim=-1).max(dim=-1)
        answers.append(top.indices.cpu())
        confidence.append(top.values.cpu())
    place_N = torch.tensor(by_length).argsort()
    return PromptStates(torch.cat(states)[place_N], torch.cat(answers)[place_N], torch.cat(confidence)[place_N])


def _extract_batch(base: BaseModel, wordings: Sequence[Wording], prefixes: Prefixes) -> Activations:
    """Rows are laid out as [left padding | shared prefix | own prompt | target | right padding], of which the first two
    are not computed again. Nothing lies between the others, so that a window of attention sees what it would."""
    B, T = len(wordings), max(len(wording.target_ids) for wording in wordings)
    own = [wording.prompt_ids[wording.shared :] for wording in wordings]
    rows = [prefixes.row_of.get(wording.prompt_ids[: wording.shared]) for wording in wordings]
    S = max(len(ids) + len(wording.target_ids) for ids, wording in zip(own, wordings, strict=True)) - 1
    ids_BS = torch.full((B, S), base.tokenizer.pad_token_id)
    mask_BS = torch.zeros_like(ids_BS)
    labels_BT = torch.full((B, T), IGNORED)
    for row, (ids, wording) in enumerate(zip(own, wordings, strict=True)):
        tokens = ids + wording.target_ids[:-1]
        ids_BS[row, : len(tokens)] = torch.tensor(tokens)
        mask_BS[row, : len(tokens)] = 1
        labels_BT[row, : len(wording.target_ids)] = torch.tensor(wording.target_ids)
    last_B = torch.tensor([len(ids) - 1 for ids in own])  # the prompt's last token
    cache, shared_BQ = prefixes.of(rows)
    Q = shared_BQ.shape[1]
    mask_BK = torch.cat([shared_BQ, mask_BS], dim=1)
    positions_BS = (mask_BK.cumsum(dim=1) - 1).clamp(min=0)[:, Q:]
    with capture(base) as captured:
        output = base.model.base_model(
            input_ids=ids_BS.to(base.device),
            attention_mask=mask_BK.to(base.device),
            position_ids=positions_BS.to(base.device),
            past_key_values=cache,
            use_cache=True,
        )
    row_B1 = torch.arange(B)[:, None]
    target_BT = (last_B[:, None] + torch.arange(T)).clamp(max=S - 1)
    past_BK = torch.cat([shared_BQ, (torch.arange(S) < last_B[:, None]).long()], dim=1)
    P = int(past_BK.sum(dim=1).max())
    # What is past comes last, in its order: the padding of both ends is on the left then.
    order_BP = past_BK.argsort(dim=1, stable=True)[:, Q + S - P :]
    suffix_layers = output.past_key_values.layers[base.layer + 1 :]

    def past(tensor_BHKd: Tensor) -> Tensor:
        return tensor_BHKd.cpu().transpose(1, 2)[row_B1, order_BP].transpose(1, 2).float()

    return Activations(
        states_ND=captured.states_BTD.cpu()[torch.arange(B), last_B].float(),
        keys_NTF=captured.keys_BTF.cpu()[row_B1, target_BT].float(),
        hidden_NTD=captured.hidden_BTD.cpu()[row_B1, target_BT].float(),
        labels_NT=labels_BT,
        positions_NT=positions_BS[row_B1, target_BT],
        past=[(past(layer.keys), past(layer.values)) for layer in suffix_layers],
        past_mask_NP=past_BK[row_B1, order_BP],
    )


def _extract_whole(base: BaseModel, wordings: Sequence[Wording]) -> Activations:
    """Rows are laid out as [prompt | target | right padding]; causal attention keeps the padding from being seen."""
    T = max(len(wording.prompt_ids) + len(wording.target_ids) for wording in wordings) - 1
    ids_BT = torch.full((len(wordings), T), base.tokenizer.pad_token_id)
    labels_BT = torch.full((len(wordings), T), IGNORED)
    for row, wording in enumerate(wordings):
        tokens, last = wording.prompt_ids + wording.target_ids[:-1], len(wording.prompt_ids) - 1
        ids_BT[row, : len(tokens)] = torch.tensor(tokens)
        labels_BT[row, last : len(tokens)] = torch.tensor(wording.target_ids)
    with capture(base) as captured:
        base.model.base_model(input_ids=ids_BT.to(base.device), use_cache=False)
    last_B = torch.tensor([len(wording.prompt_ids) - 1 for wording in wordings])
    return Activations(
        states_ND=captured.states_BTD.float().cpu()[torch.arange(len(wordings)), last_B],
        keys_NTF=captured.keys_BTF.float().cpu(),
        hidden_NTD=captured.hidden_BTD.float().cpu(),
        labels_NT=labels_BT,
        positions_NT=torch.arange(T).expand(len(wordings), T).contiguous(),
        past=[],
        past_mask_NP=ids_BT.new_zeros(len(wordings), 0),
    )


def _pad(part: Activations, *, T: int, P: int) -> Activations:
    right, left = T - part.labels_NT.shape[1], P - part.past_mask_NP.shape[1]
    return Activations(
        states_ND=part.states_ND,
        keys_NTF=pad(part.keys_NTF, (0, 0, 0, right)),
        hidden_NTD=pad(part.hidden_NTD, (0, 0, 0, right)),
        labels_NT=pad(part.labels_NT, (0, right), value=IGNORED),
        positions_NT=pad(part.positions_NT, (0, right)),
        past=[(pad(key, (0, 0, left, 0)), pad(value, (0, 0, left, 0))) for key, value in part.past],
        past_mask_NP=pad(part.past_mask_NP, (left, 0)),
    )
