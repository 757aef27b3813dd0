from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class TensorRef(_message.Message):
    __slots__ = ("name", "datatype", "shape", "offset", "size")
    NAME_FIELD_NUMBER: _ClassVar[int]
    DATATYPE_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    name: str
    datatype: str
    shape: _containers.RepeatedScalarFieldContainer[int]
    offset: int
    size: int
    def __init__(self, name: _Optional[str] = ..., datatype: _Optional[str] = ..., shape: _Optional[_Iterable[int]] = ..., offset: _Optional[int] = ..., size: _Optional[int] = ...) -> None: ...

class ToWorker(_message.Message):
    __slots__ = ("load", "unload", "stop", "iterate")
    class Load(_message.Message):
        __slots__ = ("call", "variant", "max_batch", "tensor_parallel", "pipeline_parallel", "kv_bytes")
        CALL_FIELD_NUMBER: _ClassVar[int]
        VARIANT_FIELD_NUMBER: _ClassVar[int]
        MAX_BATCH_FIELD_NUMBER: _ClassVar[int]
        TENSOR_PARALLEL_FIELD_NUMBER: _ClassVar[int]
        PIPELINE_PARALLEL_FIELD_NUMBER: _ClassVar[int]
        KV_BYTES_FIELD_NUMBER: _ClassVar[int]
        call: int
        variant: str
        max_batch: int
        tensor_parallel: int
        pipeline_parallel: int
        kv_bytes: int
        def __init__(self, call: _Optional[int] = ..., variant: _Optional[str] = ..., max_batch: _Optional[int] = ..., tensor_parallel: _Optional[int] = ..., pipeline_parallel: _Optional[int] = ..., kv_bytes: _Optional[int] = ...) -> None: ...
    class Unload(_message.Message):
        __slots__ = ("call", "variant")
        CALL_FIELD_NUMBER: _ClassVar[int]
        VARIANT_FIELD_NUMBER: _ClassVar[int]
        call: int
        variant: str
        def __init__(self, call: _Optional[int] = ..., variant: _Optional[str] = ...) -> None: ...
    class Run(_message.Message):
        __slots__ = ("variant", "inputs", "output_offset", "output_capacity")
        VARIANT_FIELD_NUMBER: _ClassVar[int]
        INPUTS_FIELD_NUMBER: _ClassVar[int]
        OUTPUT_OFFSET_FIELD_NUMBER: _ClassVar[int]
        OUTPUT_CAPACITY_FIELD_NUMBER: _ClassVar[int]
        variant: str
        inputs: _containers.RepeatedCompositeFieldContainer[TensorRef]
        output_offset: int
        output_capacity: int
        def __init__(self, variant: _Optional[str] = ..., inputs: _Optional[_Iterable[_Union[TensorRef, _Mapping]]] = ..., output_offset: _Optional[int] = ..., output_capacity: _Optional[int] = ...) -> None: ...
    class Iterate(_message.Message):
        __slots__ = ("call", "variant", "kv_tokens", "freed", "prefill", "decode")
        CALL_FIELD_NUMBER: _ClassVar[int]
        VARIANT_FIELD_NUMBER: _ClassVar[int]
        KV_TOKENS_FIELD_NUMBER: _ClassVar[int]
        FREED_FIELD_NUMBER: _ClassVar[int]
        PREFILL_FIELD_NUMBER: _ClassVar[int]
        DECODE_FIELD_NUMBER: _ClassVar[int]
        call: int
        variant: str
        kv_tokens: int
        freed: _containers.RepeatedScalarFieldContainer[int]
        prefill: _containers.RepeatedCompositeFieldContainer[ToWorker.Context]
        decode: _containers.RepeatedScalarFieldContainer[int]
        def __init__(self, call: _Optional[int] = ..., variant: _Optional[str] = ..., kv_tokens: _Optional[int] = ..., freed: _Optional[_Iterable[int]] = ..., prefill: _Optional[_Iterable[_Union[ToWorker.Context, _Mapping]]] = ..., decode: _Optional[_Iterable[int]] = ...) -> None: ...
    class Context(_message.Message):
        __slots__ = ("sequence", "tokens")
        SEQUENCE_FIELD_NUMBER: _ClassVar[int]
        TOKENS_FIELD_NUMBER: _ClassVar[int]
        sequence: int
        tokens: _containers.RepeatedScalarFieldContainer[int]
        def __init__(self, sequence: _Optional[int] = ..., tokens: _Optional[_Iterable[int]] = ...) -> None: ...
    class Stop(_message.Message):
        __slots__ = ()
        def __init__(self) -> None: ...
    LOAD_FIELD_NUMBER: _ClassVar[int]
    UNLOAD_FIELD_NUMBER: _ClassVar[int]
    STOP_FIELD_NUMBER: _ClassVar[int]
    ITERATE_FIELD_NUMBER: _ClassVar[int]
    load: ToWorker.Load
    unload: ToWorker.Unload
    stop: ToWorker.Stop
    iterate: ToWorker.Iterate
    def __init__(self, load: _Optional[_Union[ToWorker.Load, _Mapping]] = ..., unload: _Optional[_Union[ToWorker.Unload, _Mapping]] = ..., stop: _Optional[_Union[ToWorker.Stop, _Mapping]] = ..., iterate: _Optional[_Union[ToWorker.Iterate, _Mapping]] = ...) -> None: ...

class FromWorker(_message.Message):
    __slots__ = ("ready", "loaded", "unloaded", "failed", "freed", "iterated")
    class Ready(_message.Message):
        __slots__ = ("process", "variants")
        PROCESS_FIELD_NUMBER: _ClassVar[int]
        VARIANTS_FIELD_NUMBER: _ClassVar[int]
        process: int
        variants: _containers.RepeatedScalarFieldContainer[str]
        def __init__(self, process: _Optional[int] = ..., variants: _Optional[_Iterable[str]] = ...) -> None: ...
    class Loaded(_message.Message):
        __slots__ = ("call", "weight_bytes", "load_s", "first_inference_s", "inputs", "outputs", "generates")
        CALL_FIELD_NUMBER: _ClassVar[int]
        WEIGHT_BYTES_FIELD_NUMBER: _ClassVar[int]
        LOAD_S_FIELD_NUMBER: _ClassVar[int]
        FIRST_INFERENCE_S_FIELD_NUMBER: _ClassVar[int]
        INPUTS_FIELD_NUMBER: _ClassVar[int]
        OUTPUTS_FIELD_NUMBER: _ClassVar[int]
        GENERATES_FIELD_NUMBER: _ClassVar[int]
        call: int
        weight_bytes: int
        load_s: float
        first_inference_s: float
        inputs: _containers.RepeatedCompositeFieldContainer[FromWorker.TensorSpec]
        outputs: _containers.RepeatedCompositeFieldContainer[FromWorker.TensorSpec]
        generates: FromWorker.Vocabulary
        def __init__(self, call: _Optional[int] = ..., weight_bytes: _Optional[int] = ..., load_s: _Optional[float] = ..., first_inference_s: _Optional[float] = ..., inputs: _Optional[_Iterable[_Union[FromWorker.TensorSpec, _Mapping]]] = ..., outputs: _Optional[_Iterable[_Union[FromWorker.TensorSpec, _Mapping]]] = ..., generates: _Optional[_Union[FromWorker.Vocabulary, _Mapping]] = ...) -> None: ...
    class Vocabulary(_message.Message):
        __slots__ = ("tokens", "max_context", "kv_bytes_per_token", "stop_tokens")
        TOKENS_FIELD_NUMBER: _ClassVar[int]
        MAX_CONTEXT_FIELD_NUMBER: _ClassVar[int]
        KV_BYTES_PER_TOKEN_FIELD_NUMBER: _ClassVar[int]
        STOP_TOKENS_FIELD_NUMBER: _ClassVar[int]
        tokens: int
        max_context: int
        kv_bytes_per_token: int
        stop_tokens: _containers.RepeatedScalarFieldContainer[int]
        def __init__(self, tokens: _Optional[int] = ..., max_context: _Optional[int] = ..., kv_bytes_per_token: _Optional[int] = ..., stop_tokens: _Optional[_Iterable[int]] = ...) -> None: ...
    class Iterated(_message.Message):
        __slots__ = ("call", "tokens", "run_s")
        CALL_FIELD_NUMBER: _ClassVar[int]
        TOKENS_FIELD_NUMBER: _ClassVar[int]
        RUN_S_FIELD_NUMBER: _ClassVar[int]
        call: int
        tokens: _containers.RepeatedScalarFieldContainer[int]
        run_s: float
        def __init__(self, call: _Optional[int] = ..., tokens: _Optional[_Iterable[int]] = ..., run_s: _Optional[float] = ...) -> None: ...
    class TensorSpec(_message.Message):
        __slots__ = ("name", "datatype", "shape")
        NAME_FIELD_NUMBER: _ClassVar[int]
        DATATYPE_FIELD_NUMBER: _ClassVar[int]
        SHAPE_FIELD_NUMBER: _ClassVar[int]
        name: str
        datatype: str
        shape: _containers.RepeatedScalarFieldContainer[int]
        def __init__(self, name: _Optional[str] = ..., datatype: _Optional[str] = ..., shape: _Optional[_Iterable[int]] = ...) -> None: ...
    class Done(_message.Message):
        __slots__ = ("outputs",)
        OUTPUTS_FIELD_NUMBER: _ClassVar[int]
        outputs: _containers.RepeatedCompositeFieldContainer[TensorRef]
        def __init__(self, outputs: _Optional[_Iterable[_Union[TensorRef, _Mapping]]] = ...) -> None: ...
    class Freed(_message.Message):
        __slots__ = ("call",)
        CALL_FIELD_NUMBER: _ClassVar[int]
        call: int
        def __init__(self, call: _Optional[int] = ...) -> None: ...
    class Unloaded(_message.Message):
        __slots__ = ("call",)
        CALL_FIELD_NUMBER: _ClassVar[int]
        call: int
        def __init__(self, call: _Optional[int] = ...) -> None: ...
    class Failed(_message.Message):
        __slots__ = ("call", "problem", "invalid_input")
        CALL_FIELD_NUMBER: _ClassVar[int]
        PROBLEM_FIELD_NUMBER: _ClassVar[int]
        INVALID_INPUT_FIELD_NUMBER: _ClassVar[int]
        call: int
        problem: str
        invalid_input: bool
        def __init__(self, call: _Optional[int] = ..., problem: _Optional[str] = ..., invalid_input: _Optional[bool] = ...) -> None: ...
    READY_FIELD_NUMBER: _ClassVar[int]
    LOADED_FIELD_NUMBER: _ClassVar[int]
    UNLOADED_FIELD_NUMBER: _ClassVar[int]
    FAILED_FIELD_NUMBER: _ClassVar[int]
    FREED_FIELD_NUMBER: _ClassVar[int]
    ITERATED_FIELD_NUMBER: _ClassVar[int]
    ready: FromWorker.Ready
    loaded: FromWorker.Loaded
    unloaded: FromWorker.Unloaded
    failed: FromWorker.Failed
    freed: FromWorker.Freed
    iterated: FromWorker.Iterated
    def __init__(self, ready: _Optional[_Union[FromWorker.Ready, _Mapping]] = ..., loaded: _Optional[_Union[FromWorker.Loaded, _Mapping]] = ..., unloaded: _Optional[_Union[FromWorker.Unloaded, _Mapping]] = ..., failed: _Optional[_Union[FromWorker.Failed, _Mapping]] = ..., freed: _Optional[_Union[FromWorker.Freed, _Mapping]] = ..., iterated: _Optional[_Union[FromWorker.Iterated, _Mapping]] = ...) -> None: ...
