// Arguments of the sequence fusion op on raw pointers, shared by the CPU and the CUDA backend.
//
//     H_m = activation(x_m Wd_m^T + b_m)           [B, T_m, r_m]
//     P_mq = A_mq^T H_m                            [B, T_o, r_m]     q = 1 .. R
//     y = residual + sum_q prod_m P_mq U_mq        [B, T_o, D]
#pragma once

#include "tensors.h"

namespace fastadapters {

constexpr int kMaxModalities = 8;

struct Modality {
  Dtype x_dtype = Dtype::float32;  // that of the products, or fp32
  Rows x;                          // [B, T_m, D_m]; rows[1], rows[2] are B, T_m; in backward absent
                                   // where nothing asked for needs its values
  int64_t tokens = 0;              // T_m, at most the T of A
  int64_t dim = 0;                 // D_m
  int64_t width = 0;               // r_m
  int64_t factor_tokens = 0;       // the T of A
  const int64_t* lengths = nullptr;  // [B]: tokens from there on do not count; all do if absent;
                                     // < 0 is 0, > T_m is T_m
  Parameter down_weight;             // [r_m, D_m]
  Parameter down_bias;               // [r_m]
  Parameter time_factor;             // A [time_rank, T, T_o]
  Parameter feature_factor;          // U [feature_rank, r_m, D]
};

struct SequenceFusion {
  // `dtype` is that of the products, out_dtype that of residual, y and dy: the same or fp32.
  Dtype dtype = Dtype::float32, out_dtype = Dtype::float32;
  int modalities = 0;
  Modality modality[kMaxModalities];
  int64_t items = 0;    // B
  int64_t out_len = 0;  // T_o
  int64_t dim = 0;      // D
  int64_t time_rank = 0, feature_rank = 0;
  // Factors are summed over their ranks before anything else, so that R = 1; else both are R.
  bool summed = false;
  Activation activation = Activation::gelu;
  // The residual is the first T_o tokens of the x_m laid end to end (of those that count; 0 where
  // there are no more); D_m = D and x_dtype = out_dtype for those that it reaches.
  bool add_leading = false;
  float* products = nullptr;  // P, saved for backward: for each m in turn [B, R, T_o, r_m]
  void* z = nullptr;          // x_m Wd_m^T + b_m in `dtype`: for each m in turn [B, T_m, r_m]

  int64_t rank() const { return summed ? 1 : time_rank; }
};

struct SequenceFusionForward : SequenceFusion {
  Rows residual;  // [B, T_o, D], rows[1], rows[2] are B, T_o
  Rows y;
};

struct SequenceFusionBackward : SequenceFusion {
  struct Gradients {
    Rows dx;
    Parameter d_down_weight, d_down_bias, d_time_factor, d_feature_factor;
  };
  Rows dy;
  Gradients gradients[kMaxModalities];
};

}  // namespace fastadapters
