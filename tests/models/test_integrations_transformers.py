"""transformers: replacement in its models, loading of weights, and its Trainer."""

import copy
import inspect

import pytest
import torch
import transformers
from model_zoo import check_replaced_and_restored, first_tensor, ours_in, speak
from safetensors.torch import load_file, save_file
from torch import nn
from torch.testing import assert_close
from transformers.models.convnext.modeling_convnext import ConvNextLayerNorm

import normnorm
from normnorm.integrations import transformers as normnorm_transformers

SMALL = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48,
}  # fmt: skip


def bert():
    return transformers.BertModel(transformers.BertConfig(vocab_size=50, **SMALL))


def resnet():
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic"
    )
    return transformers.ResNetModel(config)


def convnext():
    config = transformers.ConvNextConfig(hidden_sizes=[8, 16, 16, 24], depths=[1, 1, 1, 1])
    return transformers.ConvNextModel(config)


def wav2vec2():
    config = transformers.Wav2Vec2Config(
        conv_dim=(16, 16), conv_kernel=(10, 3), conv_stride=(5, 2), num_feat_extract_layers=2,
        num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2, **SMALL,
    )  # fmt: skip
    return transformers.Wav2Vec2Model(config)


def llama():
    return transformers.LlamaModel(transformers.LlamaConfig(vocab_size=50, **SMALL))


TOKENS = torch.arange(20).reshape(2, 10)
# name -> (build, input, norms)
MODELS = {
    "bert": (bert, TOKENS, 5),
    "resnet": (resnet, torch.linspace(0, 9, 2 * 3 * 32 * 32).reshape(2, 3, 32, 32).sin(), 6),
    "convnext": (convnext, torch.linspace(0, 9, 2 * 3 * 4096).reshape(2, 3, 64, 64).sin(), 9),
    "wav2vec2": (wav2vec2, torch.linspace(0, 99, 2 * 800).reshape(2, 800).sin(), 7),
}


def build(name):
    torch.manual_seed(0)
    make, input, _ = MODELS[name]
    return speak(make()).eval(), input


@pytest.mark.parametrize("name", MODELS)
def test_outputs_stay_without_transform_and_noise_and_come_back_exactly(name):
    assert check_replaced_and_restored(*build(name)) == MODELS[name][-1]


def test_root_mean_square_norms_are_left():
    summary = normnorm.replace_norms(llama())
    assert not summary.replaced
    assert len(summary.left) == 5
    assert all("root mean square" in swap.reason for swap in summary.left)


@pytest.mark.parametrize("data_format", ["channels_first", "channels_last"])
def test_layer_norms_of_either_data_format_are_replaced_and_restored(data_format):
    theirs = speak(ConvNextLayerNorm(6, data_format=data_format))
    model = nn.Sequential(theirs)
    first = data_format == "channels_first"
    check_replaced_and_restored(model, torch.randn((2, 6, 3, 4) if first else (2, 3, 4, 6)))
    assert vars(model[0]).keys() == vars(theirs).keys()
    normnorm.replace_norms(model)
    assert type(model[0]) is (normnorm.LayerNormalNorm2d if first else normnorm.LayerNormalNorm)


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
    model, input = build("resnet")
    normnorm.replace_norms(model, noise_train=0.0)
    model.train()
    for _ in range(3):
        model(input.exp())
    return model.eval(), input


@pytest.mark.parametrize("layer_left_out", [False, True])
def test_tensors_missing_from_a_checkpoint_get_initial_values(layer_left_out, tmp_path):
    plain, input = build("resnet")
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
    assert {layer.noise_train for layer in ours_in(loaded)} == {0.2}
    with torch.no_grad():
        assert torch.equal(first_tensor(loaded.eval()(input)), first_tensor(model(input)))
    # A task model with the same body.
    task = normnorm_transformers.from_pretrained(
        transformers.ResNetForImageClassification, tmp_path
    )
    assert_close(all_lmbda(task.resnet), all_lmbda(model), rtol=0.0, atol=0.0)


def test_loading_chooses_as_replacing_does_and_lambda_is_one_where_it_is_not_saved(tmp_path):
    plain, input = build("resnet")
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


def test_its_trainer_spares_our_layers_weight_decay_as_torchs(tmp_path):
    plain, ours = bert(), bert()
    normnorm.replace_norms(ours)
    arguments = transformers.TrainingArguments(output_dir=str(tmp_path), report_to=[], use_cpu=True)
    decaying = [
        transformers.Trainer(model=model, args=arguments).get_decay_parameter_names(model)
        for model in (plain, ours)
    ]
    assert decaying[0] == decaying[1]
