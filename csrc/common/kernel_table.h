// What a set of CPU kernels is: plain structs and function pointers, one table per instruction set (isa.h picks one).
#pragma once

#include <stdint.h>

#include "../shapley/shapley.h"
#include "../submodular/submodular.h"

namespace finecf {

template <class T>
struct MaskedScoresArgs {
  const T* cell_logits;  // [P, C]
  const T* base_logits;  // [C]
  const T* relative;     // [P + 1, width], see shapley_relative
  const T* masks;        // [M, P]
  T* out;                // [M]
  int64_t cells, classes, width, target;
  Value value;
};

template <class T>
struct WalkArgs {
  const T* relative;            // [P + 1, width]
  const T* growth;              // [P, width] exp of the cells' rows; unused when run == 0
  const T* start;               // [width] exp of the base row
  const int32_t* permutations;  // [M, P]
  int64_t cells, width, target;
  Value value;
  bool antithetic;
  int run;        // from prepare_walk
  T empty_value;  // value of the empty coalition
};

// A pair that the factorised scan could not rule out.
struct Pair {
  int32_t row;        // position among the active cells of this edit
  int32_t keep;       // not zero: its product was too small to be trusted, whatever its loss
  int64_t candidate;  // bank row
  double loss;        // the factorised loss
};

// A growing list of pairs owned by the caller. `grow` makes room for `more` further pairs; it may first drop pairs
// whose factorised loss is above `limit`.
struct PairList {
  Pair* data;
  int64_t size, capacity;
  void (*grow)(PairList*, int64_t more, double limit);
};

// One edit of one image, factorised: what every thread of the scan reads.
template <class T>
struct ScanArgs {
  const T* factors;      // A, packed: for each block of rows, [C, rows of the block]
  const T* row_bias;     // [rows] weight_sim + weight_cls (m_p - l_t + L_pt)
  const int64_t* cells;  // [rows] the cell of each row
  const T* similarity;   // [P, N]
  const T* column_bias;  // [panels * cols] weight_cls (n_n - K_nt), or +inf where the candidate is not allowed
  int64_t rows, classes, candidates;
  int64_t first;  // bank row of column 0 of panel 0
  T weight_sim, weight_cls;
  double guard_slack;  // absolute part of the guard
  double guard_relative;
};

template <class T>
struct ExactArgs {
  const T* logits;            // [C] now
  const T* cell_logits;       // [P, C]
  const T* candidate_logits;  // [N, C]
  const T* similarity;        // [P, N]
  int64_t classes, candidates, target;
  double weight_sim, weight_cls;
};

template <class T>
struct Kernels {
  int lanes, tile_rows, tile_cols, dot_rows, dot_cols;

  void (*relative)(const T* cell_logits, const T* base_logits, int64_t cells, int64_t classes, int64_t target,
                   int64_t width, T* relative);
  T (*value_of)(const T* relative_row, int64_t width, int64_t target, Value value);
  void (*masked_scores)(const MaskedScoresArgs<T>&, int64_t begin, int64_t end, T* scratch);
  int (*prepare_walk)(const T* relative, int64_t cells, int64_t width, int64_t classes, T* growth, T* start);
  void (*walk_tile)(const WalkArgs<T>&, int64_t begin, int64_t count, T* scratch, double* mean, double* m2);

  void (*cosine_block)(const T* query, const T* query_scale, int64_t queries, const T* bank, int64_t count,
                       int64_t width, T* out, int64_t out_stride, T* scratch);
  void (*inverse_norms)(const T* rows, int64_t count, int64_t width, T* out);
  T (*pack_panel)(const T* rows, int64_t count, int64_t classes, T* panel, T* row_max, T* scratch);
  T (*pack_factors)(const T* logits, const T* cell_logits, const int64_t* cells, int64_t rows, int64_t classes,
                    T* factors, T* row_max, T* scratch);
  void (*scan_panel)(const ScanArgs<T>&, const T* panel, int64_t panel_index, double* best, PairList* pairs);
  void (*exact_losses)(const ExactArgs<T>&, const int64_t* cells, Pair* pairs, int64_t count, double* scratch);

  double (*submodular_probability)(const T* logits, int64_t classes, int64_t width, int64_t target, double* scratch);
  double (*submodular_confidence)(const T* logits, int64_t classes, int64_t width, int64_t target,
                                  Confidence confidence, double log_classes, double* scratch, double* score);
};

struct KernelTable {
  const char* name;
  Kernels<float> f32;
  Kernels<double> f64;
};

}  // namespace finecf
