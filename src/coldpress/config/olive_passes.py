"""Every pass that Olive has or had, so that one we lack is refused by name and never taken for a misspelt word."""

from __future__ import annotations

__all__ = ["OLIVE_PASSES", "RENAMED_PASSES"]

_BUILDER = "ModelBuilder builds the ONNX model"
_INT4 = "ModelBuilder with precision int4"
_INT8 = "ModelBuilder with precision int8"
_HALF = "ModelBuilder with precision fp16"
_LORA = "LoRA"
_NONE = ""

RENAMED_PASSES = {"GenAIModelExporter": "ModelBuilder"}
"""Old name of a pass we have."""

_GROUPS: dict[str, tuple[str, ...]] = {
    _LORA: ("SDLoRA",),
    _INT4: (
        "Gptq", "Rtn", "KQuant", "GptqQuantizer", "GptqModel", "AutoAWQQuantizer", "AutoClip", "QuaRot", "SpinQuant",
        "OnnxBlockWiseRtnQuantization", "OnnxKQuantQuantization", "OnnxHqqQuantization", "OnnxBnb4Quantization",
        "OnnxMatMul4Quantizer", "NVModelOptQuantization", "QuarkQuantization", "QuarkQuantizationVitisAI",
        "MatMulNBitsToQDQ", "SelectiveMixedPrecision",
    ),
    _INT8: (
        "OnnxQuantization", "OnnxStaticQuantization", "OnnxDynamicQuantization", "OnnxQuantizationPreprocess",
        "IncQuantization", "IncDynamicQuantization", "IncStaticQuantization", "AimetQuantization",
        "QuantizationAwareTraining", "VitisAIQuantization", "VitisQDQQuantizer", "VitisQOpQuantizer",
        "PowerOfTwoMethod", "quantize_static",
    ),
    _HALF: ("OnnxFloatToFloat16", "OrtMixedPrecision", "OnnxIODataTypeConverter", "OnnxIOFloat16ToFloat32"),
    _BUILDER: (
        "OnnxConversion", "MobiusBuilder", "OptimumConversion", "OptimumMerging", "OnnxOpVersionConversion",
        "OnnxPeepholeOptimizer", "OnnxModelOptimizer", "OnnxScriptFusion", "OrtTransformersOptimization",
        "OrtTransformerOptimization", "DynamicToFixedShape", "GraphSurgeries", "SplitModel", "ComposeOnnxModels",
        "StaticLLM", "AddOliveMetadata", "InsertBeamSearch", "AppendPrePostProcessingOps",
        "OpenVINOConversion", "OpenVINOOptimumConversion", "ConvertHfToGGUF", "MoEExpertsDistributor",
        "OptimumConversion", "InputNCHWtoNHWC", "ModelOptimizer",
    ),
    _NONE: (
        "SparseGPT", "SliceGPT", "CaptureSplitInfo", "CaptureLayerAnnotations", "SaveTestModelConfig",
        "NVModelOptGraphSurgery", "OnnxDiscrepancyCheck", "OrtSessionParamsTuning", "OrtPerfTuning", "QNNPreprocess",
        "MixedPrecisionOverrides", "EPContextBinaryGenerator", "QNNConversion", "QNNModelLibGenerator",
        "QNNContextBinaryGenerator", "QairtPreparation", "QairtGenAIBuilder", "QairtEncapsulation",
        "QairtPipelinePass", "QairtMHA2SHA", "OpenVINOQuantization", "OpenVINOQuantizationWithAccuracy",
        "OpenVINOWeightCompression", "OpenVINOIoUpdate", "OpenVINOEncapsulation", "VitisAIAddMetaData",
        "VitisGenerateModelLLM", "RyzenGenerateModelLLM", "VitisGenerateModelSD", "PyTorchTensorParallel",
        "TorchTRTConversion", "SNPEConversion", "SNPEQuantization", "SNPEtoONNXConversion",
    ),
}  # fmt: skip

_OVERRIDES = {
    "OnnxDiscrepancyCheck": "the parity check that runs after every lossy step",
    "OpenVINOQuantization": _INT8,
    "OpenVINOQuantizationWithAccuracy": _INT8,
    "OpenVINOWeightCompression": _INT4,
}

OLIVE_PASSES: dict[str, str] = {
    **{name: near for near, names in _GROUPS.items() for name in names},
    **_OVERRIDES,
}
"""Pass -> what of ours comes nearest; empty where nothing does."""
