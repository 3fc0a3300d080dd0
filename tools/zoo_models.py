"""Every model builder of torchvision and one or more of each family of timm, with an input that is small for it."""

from __future__ import annotations

from collections.abc import Callable
from fnmatch import fnmatch
from functools import partial
from typing import Any

from torch import Tensor, nn
from zoo import timm_model, torchvision_models

Shape = tuple[int, ...]
Entry = tuple[Callable[[], nn.Module], Shape]

IMAGE = (1, 3, 64, 64)
SHAPES: dict[str, Shape] = {
    "alexnet": (1, 3, 96, 96),
    "*inception_v3": (1, 3, 96, 96),
    "vit_?_32": (1, 3, 96, 96),
    "vit_h_14": (1, 3, 56, 56),
    "maxvit_t": (1, 3, 224, 224),
    "r3d_18": (1, 3, 4, 32, 32),
    "mc3_18": (1, 3, 4, 32, 32),
    "r2plus1d_18": (1, 3, 4, 32, 32),
    "swin3d_?": (1, 3, 8, 64, 64),
    "mvit_v?_?": (1, 3, 16, 224, 224),
    "s3d": (1, 3, 16, 224, 224),
    "raft_*": (1, 6, 128, 128),
    "ssd300_vgg16": (1, 3, 300, 300),
    "ssdlite320_*": (1, 3, 320, 320),
    "*_fpn*": (1, 3, 128, 128),
}
"""Pattern of torchvision names -> shape of the input; the others take `IMAGE`."""
SHALLOW = ("vit_h_14", "regnet_y_128gf")
"""They have 2.5 GB of weights, of which several copies are held: their widths, in fewer blocks."""
TIMM = {
    64: """
        resnet18d ecaresnet26t resnetv2_18 resnest14d res2net50_14w_8s res2next50 skresnet18 legacy_seresnet18
        seresnext26d_32x4d ghostnet_050 ghostnetv2_100 repghostnet_050 mobilenetv3_small_050 mobilenetv4_conv_small
        lcnet_050 tinynet_e mnasnet_050 fbnetc_100 fbnetv3_b spnasnet_100 hardcorenas_a semnasnet_075 mixnet_s
        efficientnet_lite0 efficientnet_es efficientnetv2_rw_t tf_efficientnetv2_b0 tf_mobilenetv3_small_minimal_100
        rexnet_100 regnetx_002 regnety_002 regnetz_005 repvgg_a0 mobileone_s0 hgnetv2_b0 dla34 dla46x_c dpn48b
        hrnet_w18_small densenet121 vgg11 cspdarknet53 cs3darknet_focus_s cspresnet50 darknet53 gernet_s vovnet39a
        ese_vovnet19b_dw selecsls42 xception41 legacy_xception nf_regnet_b0
        dm_nfnet_f0 tresnet_m convnext_atto convnextv2_atto convmixer_768_32 inception_next_atto rdnet_tiny
        starnet_s1 lcnetv2_small fasternet_t0 mambaout_femto repvit_m0_9 poolformer_s12 poolformerv2_s12
        caformer_s18 convformer_s18 edgenext_xx_small efficientvit_b0 pvt_v2_b0
    """,
    128: """
        inception_v4 inception_resnet_v2 shvit_s1 mobilevit_xxs mobilevitv2_050 fastvit_t8 efficientvim_m1
        focalnet_tiny_srf
    """,
    224: """
        efficientformer_l1 efficientformerv2_s0 efficientvit_m0 swiftformer_xs tiny_vit_5m_224 levit_128s
        deit_tiny_patch16_224 cait_xxs24_224 coat_lite_tiny xcit_nano_12_p16_224 pit_ti_224 mixer_s32_224 resmlp_12_224
        gmlp_ti16_224 convit_tiny visformer_tiny twins_svt_small swin_s3_tiny_224 nest_tiny gcvit_xxtiny
        coatnet_nano_rw_224 maxvit_rmlp_pico_rw_256 beit_base_patch16_224 vit_relpos_small_patch16_224
        eva02_tiny_patch14_224 davit_tiny tnt_s_patch16_224 crossvit_tiny_240 mvitv2_tiny sequencer2d_s hiera_tiny_224
        volo_d1_224 nextvit_small botnet26t_256 halonet26t lambda_resnet26t
    """,
}
OWN_SIZE = {"maxvit_rmlp_pico_rw_256": 256, "crossvit_tiny_240": 240, "botnet26t_256": 256, "halonet26t": 256}
OWN_SIZE |= {"lambda_resnet26t": 256, "swiftformer_xs": 224}


def zoo() -> dict[str, Entry]:
    """Name -> (builder, shape of the input)."""
    models = torchvision_models()
    detectors = set(models.list_models(module=models.detection))
    flow = set(models.list_models(module=models.optical_flow))
    entries: dict[str, Entry] = {}
    for name in models.list_models():
        build = build_backbone if name in detectors else build_flow if name in flow else build_torchvision
        title = f"{name}.backbone" if name in detectors else name
        shape = next((shape for pattern, shape in SHAPES.items() if fnmatch(name, pattern)), IMAGE)
        entries[f"torchvision/{title}"] = partial(build, name), shape
    for size, names in TIMM.items():
        for name in names.split():
            own = OWN_SIZE.get(name, size)
            entries[f"timm/{name}"] = partial(timm_model, name), (1, 3, own, own)
    return entries


def build_torchvision(name: str) -> nn.Module:
    """A torchvision model without weights, neither its own nor its backbone's; quantisable ones in float."""
    models = torchvision_models()
    if name in SHALLOW:
        return _shallow(models, name)
    options: dict[str, Any] = {"weights": None}
    if name.startswith(("deeplabv3", "fcn", "lraspp")):
        options["weights_backbone"] = None
    if name.endswith(("googlenet", "inception_v3")):
        options["init_weights"] = False
    if name.startswith("vit_"):
        options["image_size"] = 96 if name.endswith("32") else 64
    model = models.get_model(name, **options)
    assert isinstance(model, nn.Module)
    return model


def _shallow(models: Any, name: str) -> nn.Module:
    model: nn.Module
    if name == "vit_h_14":
        model = models.VisionTransformer(56, 14, num_layers=4, num_heads=16, hidden_dim=1280, mlp_dim=5120)
    else:
        widths, groups = [528, 1056, 2904, 7392], [264] * 4
        blocks = models.regnet.BlockParams([1] * 4, widths, groups, [1.0] * 4, [2] * 4, se_ratio=0.25)
        model = models.RegNet(blocks)
    return model


class Pair(nn.Module):
    """A model of two images that takes them as one of six channels."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, images: Tensor) -> Any:
        return self.net(images[:, :3], images[:, 3:])


def build_flow(name: str) -> nn.Module:
    """A model of optical flow."""
    return Pair(build_torchvision(name))


def build_backbone(name: str) -> nn.Module:
    """What `--scope backbone` takes of a torchvision detector, whose boxes depend on values."""
    backbone = torchvision_models().get_model(name, weights=None, weights_backbone=None).backbone
    assert isinstance(backbone, nn.Module)
    return backbone
