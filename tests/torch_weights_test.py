"""Published weights: names, layouts, and what is refused."""

import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from ralenet_jax.errors import UserError
from ralenet_jax.models import build_model
from ralenet_jax.torch_weights import from_state_dict, read, to_state_dict

NAMES = ("ralenet", "ralenet_mlp", "ralenet_nra", "unet", "danet", "acdae", "ralenet_12lead")


def random_variables(name):
    shapes = jax.eval_shape(
        build_model(name).init, jax.random.key(0), jnp.zeros((1, 256, 12 if "12lead" in name else 2))
    )
    random = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: random.standard_normal(leaf.shape).astype(np.float32), shapes)


def assert_same_tree(ours, expected):
    assert jax.tree.structure(ours) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, ours, expected)


@pytest.mark.parametrize("name", NAMES)
def test_round_trip_from_our_variables(name):
    variables = random_variables(name)
    assert_same_tree(from_state_dict(name, to_state_dict(name, variables)), variables)


@pytest.mark.parametrize("name", NAMES)
def test_round_trip_from_published_weights(name, shared):
    data = np.load(shared / "parity" / f"{name}.npz")
    published = {key.removeprefix("state_dict/"): data[key] for key in data.files if key.startswith("state_dict/")}
    assert_same_tree(to_state_dict(name, from_state_dict(name, published)), published)


def test_layouts_by_hand():
    weights = to_state_dict("ralenet", random_variables("ralenet"))
    variables = from_state_dict("ralenet", weights)
    params = variables["params"]
    stem = weights["conv1.0.weight"]  # [out, in, width]
    assert params["stem"]["kernel"][2, 1, 5] == stem[5, 1, 2]
    expand = weights["dtransformer1.blocks.1.mlp.fc1.weight"]  # [out, in]
    assert params["encoder0_1"]["feed_forward"]["expand"]["kernel"][3, 20] == expand[20, 3]
    np.testing.assert_array_equal(variables["batch_stats"]["stem_norm"]["var"], weights["conv1.2.running_var"])
    table = weights["rwattn4.relative_position_bias_table"]
    np.testing.assert_array_equal(params["r_wave3"]["table"], table)


def test_transposed_convolution_is_turned_and_flipped():
    weights = to_state_dict("danet", random_variables("danet"))
    deconvolution = weights["dec.DecoderList.2.deconv.weight"]  # [in, out, width]
    assert deconvolution.shape == (8, 4, 18)
    kernel = from_state_dict("danet", weights)["params"]["decoder1"]["kernel"]
    assert kernel[0, 7, 2] == deconvolution[7, 2, 17]
    assert kernel[15, 3, 1] == deconvolution[3, 1, 2]


def test_weights_under_two_names_are_written_twice_and_must_be_equal():
    weights = to_state_dict("danet", random_variables("danet"))
    shared = [key for key in weights if ".fcn1." in key]
    assert len(shared) == 3 * 12  # three attentions of two dense layers and two normalisations
    for key in shared:
        np.testing.assert_array_equal(weights[key], weights[key.replace("fcn1", "fcn2")])
    key = "dec.DecoderList.1.dam.fcn2.4.running_mean"
    with pytest.raises(UserError, match=r"'dec\.DecoderList\.1\.dam\.fcn1\.4\.running_mean' and .*fcn2.*differ"):
        from_state_dict("danet", weights | {key: weights[key] + 1})


def test_base_of_the_twelve_lead_model_has_its_own_names_behind_a_prefix():
    weights = to_state_dict("ralenet_12lead", random_variables("ralenet_12lead"))
    base = {key.removeprefix("rale."): array for key, array in weights.items() if key.startswith("rale.")}
    variables = from_state_dict("ralenet_12lead", weights)
    ours = {collection: values["base"] for collection, values in variables.items()}
    assert_same_tree(from_state_dict("ralenet", base), ours)
    around = {key: array.shape for key, array in weights.items() if not key.startswith("rale.")}
    assert around == {  # [out, in, width]
        **{"conv1.weight": (6, 12, 13), "conv2.weight": (2, 6, 13), "conv3.weight": (6, 2, 13)},
        **{
            "conv4.weight": (12, 6, 13),
            "conv1.bias": (6,),
            "conv2.bias": (2,),
            "conv3.bias": (6,),
            "conv4.bias": (12,),
        },
    }


def test_block_names_of_the_variant_without_r_wave_attention():
    keys = to_state_dict("ralenet_nra", random_variables("ralenet_nra"))
    assert "utranformer3.1.attn.proj.weight" in keys
    assert not any("blocks" in key or "rwattn" in key for key in keys)


def test_bookkeeping_of_real_checkpoints_is_ignored():
    variables = random_variables("ralenet")
    weights = to_state_dict("ralenet", variables)
    weights["conv1.2.num_batches_tracked"] = np.array(7)
    weights["rwattn1.relative_position_index"] = np.zeros((32, 32), int)
    assert_same_tree(from_state_dict("ralenet", weights), variables)


def test_wrong_weights_are_refused_by_name():
    weights = to_state_dict("ralenet", random_variables("ralenet"))
    lacking = {key: value for key, value in weights.items() if key != "pm3.norm.bias"}
    with pytest.raises(UserError, match=r"missing: pm3\.norm\.bias"):
        from_state_dict("ralenet", lacking)
    with pytest.raises(UserError, match=r"unknown: pm5\.norm\.bias"):
        from_state_dict("ralenet", weights | {"pm5.norm.bias": weights["pm3.norm.bias"]})
    with pytest.raises(UserError, match=r"'conv1\.0\.weight' has shape \[8, 3, 2\].*expects \[8, 2, 3\]"):
        from_state_dict("ralenet", weights | {"conv1.0.weight": weights["conv1.0.weight"].transpose(0, 2, 1)})
    with pytest.raises(UserError, match="missing: dtransformer1.0.*unknown: dtransformer1.blocks.0"):
        from_state_dict("ralenet_nra", weights)
    with pytest.raises(UserError, match="no published weights"):
        from_state_dict("ralnet", weights)


@pytest.mark.parametrize(
    "array", [np.array([np.nan] + [0] * 7), np.full(8, 1e300), np.zeros(8, complex), np.array(["x"] * 8)]
)
def test_weights_that_are_no_finite_numbers_are_refused_by_name(array):
    weights = to_state_dict("acdae", random_variables("acdae"))
    with pytest.raises(UserError, match=r"'EncList\.0\.conv\.bias' holds what is no finite number"):
        from_state_dict("acdae", weights | {"EncList.0.conv.bias": array})


def test_a_file_is_read_or_refused_in_one_line(tmp_path):
    variables, path = random_variables("acdae"), tmp_path / "a.safetensors"
    safetensors.numpy.save_file(to_state_dict("acdae", variables), path)
    assert_same_tree(read("acdae", path), variables)
    whole = path.read_bytes()
    for data in (b"", whole[:-4], b"\xff" * 8 + whole[8:], whole.replace(b"[0,", b"[4,", 1), pickle.dumps({})):
        path.write_bytes(data)
        with pytest.raises(UserError, match=r"^[^\n]*a\.safetensors is damaged or no safetensors file[^\n]*$"):
            read("acdae", path)
    with pytest.raises(UserError, match="cannot read"):
        read("acdae", tmp_path / "b.safetensors")


def test_variables_of_another_model_are_refused():
    with pytest.raises(UserError, match="params/r_wave0/table"):
        to_state_dict("ralenet_nra", random_variables("ralenet"))
