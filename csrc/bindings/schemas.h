// The raw operators that CPU and CUDA both have, declared once: llmops_cpu.* and llmops_cuda.* take
// the same arguments, and a front door need not know whose it calls.
#pragma once
#include <cstddef>

namespace llmops {

template <class Library, size_t kCount>
void define(Library& library, const char* const (&schemas)[kCount]) {
  for (const char* schema : schemas) library.def(schema);
}

// Defaults, so that the plain call has one argument to convert: each costs 0.2 to 0.6 us.
constexpr const char* kSoftmaxSchemas[] = {
    "softmax_fwd(Tensor x, float scale=1.0, Tensor? mask=None, bool causal=False, "
    "ScalarType? dtype=None) -> Tensor",
    "softmax_bwd(Tensor grad, Tensor y, float scale, ScalarType dtype) -> Tensor",
};

// Of the norms' backward, h: what was normalized (x, or the sum); dh: the gradient of the output h.
// Gives dh in total, the same in dy's dtype where that differs, dweight, dbias; of no elements
// where not needed.
constexpr const char* kLayerNormSchemas[] = {
    "layer_norm_fwd(Tensor x, Tensor? weight=None, Tensor? bias=None, float eps=1e-5, int dims=1) "
    "-> Tensor",
    "add_layer_norm_fwd(Tensor x, Tensor residual, Tensor? weight=None, Tensor? bias=None, "
    "float eps=1e-5, int dims=1) -> (Tensor, Tensor)",
    "layer_norm_bwd(Tensor dy, Tensor h, Tensor? dh, Tensor? weight, Tensor? bias, float eps, "
    "int dims=1, bool need_h=True, bool need_x=False, bool need_params=True) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
};
constexpr const char* kRmsNormSchemas[] = {
    "rms_norm_fwd(Tensor x, Tensor? weight, float eps, int dims=1, float weight_offset=0.0) "
    "-> Tensor",
    "add_rms_norm_fwd(Tensor x, Tensor residual, Tensor? weight, float eps, int dims=1, "
    "float weight_offset=0.0) -> (Tensor, Tensor)",
    "rms_norm_bwd(Tensor dy, Tensor h, Tensor? dh, Tensor? weight, float eps, int dims=1, "
    "float weight_offset=0.0, bool need_h=True, bool need_x=False, bool need_weight=True) "
    "-> (Tensor, Tensor, Tensor)",
};

constexpr const char* kGeluSchemas[] = {
    "gelu(Tensor x, bool tanh) -> Tensor",
    "gelu_bwd(Tensor grad, Tensor x, bool tanh) -> Tensor",
};
constexpr const char* kSwigluSchemas[] = {
    "swiglu(Tensor gate, Tensor? up=None) -> Tensor",
    "geglu(Tensor gate, Tensor? up, bool tanh) -> Tensor",
    "glu_bwd(Tensor grad, Tensor gate, Tensor up, int activation) -> (Tensor, Tensor)",
    "glu_bwd_fused(Tensor grad, Tensor x, int activation) -> Tensor",
};

constexpr const char* kRopeSchemas[] = {
    "rope(Tensor x, Tensor cos, Tensor sin, Tensor? position_ids=None, bool interleaved=False, "
    "bool inverse=False, bool token_major=False) -> Tensor",
    "rope_qk(Tensor q, Tensor k, Tensor cos, Tensor sin, Tensor? position_ids=None, "
    "bool interleaved=False, bool inverse=False, bool token_major=False) -> (Tensor, Tensor)",
    "rope_qk_(Tensor(a!) q, Tensor(b!) k, Tensor cos, Tensor sin, Tensor? position_ids=None, "
    "bool interleaved=False, bool inverse=False) -> ()",
};

constexpr const char* kCrossEntropySchemas[] = {
    "cross_entropy_fwd(Tensor x, Tensor target, Tensor? weight=None, int ignore_index=-100, "
    "float label_smoothing=0.0, float z_loss=0.0, int reduction=1, ScalarType? dtype=None) -> "
    "(Tensor, Tensor)",
    "cross_entropy_bwd(Tensor grad, Tensor? grad_lse, Tensor x, Tensor target, Tensor? weight, "
    "Tensor lse, int ignore_index, float label_smoothing, float z_loss, int reduction) -> Tensor",
    "cross_entropy_bwd_(Tensor grad, Tensor(a!) x, Tensor target, Tensor? weight, Tensor lse, "
    "int ignore_index, float label_smoothing, float z_loss, int reduction, "
    "Tensor? grad_lse=None) -> ()",
};

// dmask is float32, whatever the mask is; dsinks too.
constexpr const char* kAttentionSchemas[] = {
    "attention_fwd(Tensor q, Tensor k, Tensor v, Tensor? mask, bool causal, float scale, "
    "int window_left=-1, int window_right=-1, Tensor? alibi_slopes=None, float softcap=0.0, "
    "Tensor? sinks=None, float dropout_p=0.0, Tensor? seed=None) -> (Tensor, Tensor)",
    "attention_bwd(Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, "
    "Tensor? mask, Tensor out, Tensor lse, bool causal, float scale, bool need_mask_grad, "
    "int window_left=-1, int window_right=-1, Tensor? alibi_slopes=None, float softcap=0.0, "
    "Tensor? sinks=None, float dropout_p=0.0, Tensor? seed=None) -> "
    "(Tensor, Tensor, Tensor, Tensor?, Tensor?)",
};

}  // namespace llmops
