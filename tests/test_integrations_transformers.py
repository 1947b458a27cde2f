"""transformers: replacement in its models, weights from its files, and its Trainer."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from model_zoo import first_tensor, speak
from torch import nn
from torch.testing import assert_close
from transformers.models.convnext.modeling_convnext import ConvNextLayerNorm

import normnorm

OFF = {"alpha": 0.0, "noise_train": 0.0}
SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
}


def bert():
    return transformers.BertModel(transformers.BertConfig(vocab_size=50, **SMALL))


def vit():
    return transformers.ViTModel(transformers.ViTConfig(image_size=32, patch_size=8, **SMALL))


def resnet():
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic"
    )
    return transformers.ResNetModel(config)


def convnext():
    config = transformers.ConvNextConfig(hidden_sizes=[8, 16, 16, 24], depths=[1, 1, 1, 1])
    return transformers.ConvNextModel(config)


def gpt2():
    config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=50)
    return transformers.GPT2Model(config)


def wav2vec2():
    config = transformers.Wav2Vec2Config(
        conv_dim=(16, 16), conv_kernel=(10, 3), conv_stride=(5, 2), num_feat_extract_layers=2,
        num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2, **SMALL,
    )  # fmt: skip
    return transformers.Wav2Vec2Model(config)


def llama():
    return transformers.LlamaModel(transformers.LlamaConfig(vocab_size=50, **SMALL))


def t5():
    config = transformers.T5Config(
        vocab_size=50, d_model=32, d_kv=16, d_ff=48, num_layers=1, num_heads=2
    )
    return transformers.T5EncoderModel(config)


TOKENS = torch.arange(20).reshape(2, 10)
# name -> (build, input, replaced, left)
MODELS = {
    "bert": (bert, TOKENS, 5, 0),
    "vit": (vit, torch.linspace(-1, 1, 2 * 3 * 32 * 32).reshape(2, 3, 32, 32).sin(), 5, 0),
    "resnet": (resnet, torch.linspace(0, 9, 2 * 3 * 32 * 32).reshape(2, 3, 32, 32).sin(), 6, 0),
    "convnext": (convnext, torch.linspace(0, 9, 2 * 3 * 4096).reshape(2, 3, 64, 64).sin(), 9, 0),
    "gpt2": (gpt2, TOKENS, 5, 0),
    "wav2vec2": (wav2vec2, torch.linspace(0, 99, 2 * 800).reshape(2, 800).sin(), 7, 0),
    "llama": (llama, TOKENS, 0, 5),
    "t5": (t5, TOKENS, 0, 3),
}


def build(name):
    torch.manual_seed(0)
    make, input, replaced, left = MODELS[name]
    return speak(make()).eval(), input, replaced, left


@pytest.mark.parametrize("name", MODELS)
def test_outputs_stay_without_transform_and_noise_and_come_back_exactly(name):
    model, input, replaced, left = build(name)
    with torch.no_grad():
        expected = first_tensor(model(input))
        classes = [type(module) for module in model.modules()]
        summary = normnorm.replace_norms(model, **OFF)
        assert len(summary.replaced) == replaced
        assert len(summary.left) == left
        assert all("root mean square" in swap.reason for swap in summary.left)
        scale = expected.std().item()
        assert scale > 1e-2
        assert_close(first_tensor(model(input)), expected, rtol=1e-4, atol=1e-4 * scale)
        normnorm.restore_norms(model)
        assert [type(module) for module in model.modules()] == classes
        assert torch.equal(first_tensor(model(input)), expected)


@pytest.mark.parametrize("data_format", ["channels_first", "channels_last"])
def test_layer_norms_of_either_data_format_are_replaced_and_restored(data_format):
    theirs = speak(ConvNextLayerNorm(6, data_format=data_format))
    model = nn.Sequential(theirs)
    normnorm.replace_norms(model, **OFF)
    expected_class = {
        "channels_first": normnorm.LayerNormalNorm2d, "channels_last": normnorm.LayerNormalNorm,
    }[data_format]  # fmt: skip
    assert type(model[0]) is expected_class
    shape = (2, 6, 3, 4) if data_format == "channels_first" else (2, 3, 4, 6)
    input = torch.randn(shape)
    assert_close(model(input), theirs(input), rtol=1e-4, atol=1e-5)
    normnorm.restore_norms(model)
    assert type(model[0]) is ConvNextLayerNorm
    assert vars(model[0]).keys() == vars(theirs).keys()


def test_saved_weights_load_into_a_model_that_is_replaced_again(tmp_path):
    model, input, _, _ = build("resnet")
    normnorm.replace_norms(model, noise_train=0.0)
    model.train()
    for _ in range(3):
        model(input)
    model.eval()
    model.save_pretrained(tmp_path)
    state = model.state_dict()
    torch.save(state, tmp_path / "state.pt")

    # The library's own file knows no lambda when it builds its own layers from it ...
    loaded = type(model).from_pretrained(tmp_path)
    normnorm.replace_norms(loaded, noise_train=0.0)
    for name, tensor in loaded.state_dict().items():
        if name.endswith("running_lmbda"):
            assert (tensor == 1).all()
        else:
            assert torch.equal(tensor, state[name]), name
    # ... so it comes from the state dict.
    loaded.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True), strict=True)
    with torch.no_grad():
        assert torch.equal(first_tensor(loaded.eval()(input)), first_tensor(model(input)))


class Copying(torch.utils.data.Dataset):
    """Sequences of tokens whose class is their first token."""

    def __len__(self):
        return 64

    def __getitem__(self, index):
        tokens = torch.randint(3, 50, (8,), generator=torch.Generator().manual_seed(index))
        tokens[0] = index % 2 + 1
        return {"input_ids": tokens, "labels": index % 2}


def test_its_trainer_trains_a_replaced_model_and_spares_it_weight_decay(tmp_path):
    torch.manual_seed(0)
    config = transformers.BertConfig(vocab_size=50, num_labels=2, **SMALL)
    model = transformers.BertForSequenceClassification(config)
    plain = copy.deepcopy(model)
    normnorm.replace_norms(model, noise_train=0.2)
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=24, per_device_train_batch_size=16,
        learning_rate=5e-3, weight_decay=0.1, logging_steps=8, report_to=[], use_cpu=True,
        save_strategy="no", disable_tqdm=True, bf16=True,
    )  # fmt: skip
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=Copying())
    # Which parameters decay is decided by isinstance and by name: for ours as for torch's.
    assert trainer.get_decay_parameter_names(model) == trainer.get_decay_parameter_names(plain)
    before = model.bert.encoder.layer[0].output.LayerNorm.weight.detach().clone()
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.5 * losses[0]
    assert not torch.equal(model.bert.encoder.layer[0].output.LayerNorm.weight, before)


def test_gradient_checkpointing_of_its_models_gives_the_same_gradients():
    gradients = []
    for checkpointing in (False, True):
        model, input, _, _ = build("bert")
        normnorm.replace_norms(model)
        model.train()
        if checkpointing:
            getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
        torch.manual_seed(3)  # the same dropout and the same noise, the second time too
        first_tensor(model(input)).square().mean().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    assert_close(gradients[1], gradients[0])
