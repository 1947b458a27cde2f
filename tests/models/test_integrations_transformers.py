"""transformers: replacement in its models, loading of weights, and its Trainer."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch
import transformers
from model_zoo import first_tensor, speak
from safetensors.torch import load_file, save_file
from torch import nn
from torch.testing import assert_close
from transformers.models.cohere.modeling_cohere import CohereLayerNorm
from transformers.models.convnext.modeling_convnext import ConvNextLayerNorm
from transformers.models.olmo.modeling_olmo import OlmoLayerNorm

import normnorm
from normnorm.integrations import transformers as normnorm_transformers

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


def fill_free_memory():
    """Fills new memory, so that uninitialized values are not 1 by chance."""
    del [torch.full((size,), 7.5) for size in (4, 8, 16, 32, 64) * 64][:]


def all_lmbda(model):
    return {name: t for name, t in model.state_dict().items() if name.endswith("running_lmbda")}


class ReplacedResNet(transformers.ResNetModel):
    """A model constructed with normnorm layers."""

    def __init__(self, config):
        super().__init__(config)
        normnorm.replace_norms(self)


def trained_resnet():
    model, input, _, _ = build("resnet")
    normnorm.replace_norms(model, noise_train=0.0)
    model.train()
    for _ in range(3):
        model(input.exp())
    return model.eval(), input


@pytest.mark.parametrize("layer_left_out", [False, True])
def test_tensors_missing_from_a_checkpoint_get_initial_values(layer_left_out, tmp_path):
    plain, input, _, _ = build("resnet")
    plain.save_pretrained(tmp_path)
    missing = "embedder.embedder.normalization."
    if layer_left_out:
        state = load_file(tmp_path / "model.safetensors")
        state = {name: tensor for name, tensor in state.items() if not name.startswith(missing)}
        save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    fill_free_memory()
    model = ReplacedResNet.from_pretrained(tmp_path)
    lmbda = all_lmbda(model)
    assert len(lmbda) == 6
    assert all((tensor == 1).all() for tensor in lmbda.values())
    if layer_left_out:
        made = normnorm.BatchNormalNorm2d(8).state_dict()
        assert_close(model.get_submodule(missing[:-1]).state_dict(), made, rtol=0.0, atol=0.0)
    else:
        expected = first_tensor(plain(input))
        assert_close(first_tensor(model.eval()(input)), expected, rtol=1e-4, atol=1e-4)


def test_the_transformers_mark_initializes_only_during_loading():
    class Holder(transformers.PreTrainedModel):
        config_class = transformers.PretrainedConfig

        def __init__(self, config, body):
            super().__init__(config)
            self.body = body
            self.post_init()

    body = nn.Sequential(normnorm.BatchNormalNorm2d(3, noise_train=0.0))
    body(torch.empty(4, 3, 5, 5).exponential_())
    before = copy.deepcopy(body.state_dict())
    inspect.getmembers(body[0])
    model = Holder(transformers.PretrainedConfig(), body)
    model.init_weights()
    assert_close(body.state_dict(), before, rtol=0.0, atol=0.0)
    assert body[0]._is_hf_initialized is True
    assert normnorm.BatchNormalNorm2d(3)._is_hf_initialized is False


@pytest.mark.parametrize(
    ("cls", "saving", "loading"),
    [
        (transformers.ResNetModel, {}, {}),
        (transformers.AutoModel, {}, {"low_cpu_mem_usage": True}),
        (transformers.ResNetModel, {"max_shard_size": "2KB"}, {"device_map": "cpu"}),
    ],
    ids=["class", "Auto", "shards"],
)
def test_saved_lambda_comes_back(cls, saving, loading, tmp_path):
    model, input = trained_resnet()
    model.save_pretrained(tmp_path, **saving)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == bool(saving)
    fill_free_memory()
    loaded, info = normnorm_transformers.from_pretrained(
        cls, tmp_path, noise_train=0.2, output_loading_info=True, **loading
    )
    assert type(loaded) is transformers.ResNetModel
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert_close(loaded.state_dict(), model.state_dict(), rtol=0.0, atol=0.0)
    assert {m.noise_train for m in loaded.modules() if hasattr(m, "noise_train")} == {0.2}
    with torch.no_grad():
        assert torch.equal(first_tensor(loaded.eval()(input)), first_tensor(model(input)))
    # A task model with the same body.
    task = normnorm_transformers.from_pretrained(
        transformers.ResNetForImageClassification, tmp_path
    )
    assert_close(all_lmbda(task.resnet), all_lmbda(model), rtol=0.0, atol=0.0)


def test_loading_chooses_as_replacing_does_and_lambda_is_one_where_it_is_not_saved(tmp_path):
    plain, input, _, _ = build("resnet")
    plain.save_pretrained(tmp_path)
    fill_free_memory()
    model = normnorm_transformers.from_pretrained(
        transformers.ResNetModel, tmp_path, where="encoder.*"
    )
    assert len(all_lmbda(model)) == 5
    assert all((tensor == 1).all() for tensor in all_lmbda(model).values())
    expected = first_tensor(plain(input))
    assert_close(first_tensor(model.eval()(input)), expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="noise_train"):
        normnorm_transformers.from_pretrained(transformers.ResNetModel, tmp_path, noise_train=-1)
    with pytest.raises(TypeError, match="a class of transformers' models"):
        normnorm_transformers.from_pretrained(nn.Linear, tmp_path)
    with pytest.raises(OSError, match="missing"):
        normnorm_transformers.from_pretrained(transformers.ResNetModel, tmp_path / "missing")


# transformers' norm classes, registered by the user


def cohere():
    config = transformers.CohereConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=48, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return transformers.CohereModel(config)


def olmo():
    config = transformers.OlmoConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=48, pad_token_id=0,
    )  # fmt: skip
    return transformers.OlmoModel(config)


def cohere_to_ours(norm):
    new = normnorm.LayerNormalNorm(norm.weight.shape, norm.variance_epsilon, bias=False)
    new.weight = norm.weight
    return new


def cohere_back(layer):
    old = CohereLayerNorm(layer.normalized_shape, layer.eps)
    old.weight = layer.weight
    return old


def olmo_to_ours(norm):
    return normnorm.LayerNormalNorm(norm.normalized_shape, 1e-5, elementwise_affine=False)


def olmo_back(layer):
    return OlmoLayerNorm(*layer.normalized_shape)


@pytest.mark.parametrize(
    ("make", "cls", "convert", "restore"),
    [
        (cohere, CohereLayerNorm, cohere_to_ours, cohere_back),
        (olmo, OlmoLayerNorm, olmo_to_ours, olmo_back),
    ],
    ids=["cohere", "olmo"],
)
def test_layer_norms_of_its_language_models_are_replaced_once_they_are_registered(
    make, cls, convert, restore
):
    model = speak(make()).eval()
    with torch.no_grad():
        expected = first_tensor(model(TOKENS))
        left = normnorm.replace_norms(model, **OFF).left
        assert len(left) == sum(isinstance(module, cls) for module in model.modules()) > 0
        with normnorm.register_norm(cls, convert, restore):
            assert len(normnorm.replace_norms(model, **OFF).replaced) == len(left)
            assert_close(first_tensor(model(TOKENS)), expected, rtol=1e-4, atol=1e-4)
            assert len(normnorm.restore_norms(model).replaced) == len(left)
        assert torch.equal(first_tensor(model(TOKENS)), expected)


class Copying(torch.utils.data.Dataset):
    """Sequences of tokens whose class is the first token."""

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
    # isinstance and name decide which parameters decay: for normnorm's as for torch's.
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
        torch.manual_seed(3)  # the same dropout and noise in both runs
        first_tensor(model(input)).square().mean().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    assert_close(gradients[1], gradients[0])
