// CPU entry points of the `shapley` operators: checks, workspaces, threads. The contract is in shapley.h, the kernels
// in shapley_cpu_kernel.h.
#include "shapley.h"

#include <torch/csrc/stable/library.h>

#include "../common/checks.h"
#include "../common/isa.h"
#include "../common/workspace.h"
#include "shapley_value.h"

namespace finecf {
namespace {

struct Game {
  Tensor cell_logits, base_logits, target;
  int64_t images, cells, classes;
};

Game check_game(const char* op, const Tensor& cell_logits, const Tensor& base_logits, const Tensor& target) {
  check_rank(op, "cell_logits", cell_logits, 3, "B, P, C");
  check_float(op, "cell_logits", cell_logits);
  Game g{to_contiguous(cell_logits), to_contiguous(base_logits), to_contiguous(target),
         cell_logits.size(0),        cell_logits.size(1),        cell_logits.size(2)};
  check(g.classes >= 2, op, ": cell_logits must have at least 2 classes, got shape ", shape_text(cell_logits));
  check_shape(op, "base_logits", base_logits, {g.images, g.classes}, "B, C");
  check_dtype(op, "base_logits", base_logits, cell_logits.scalar_type());
  check_shape(op, "target", target, {g.images}, "B");
  check_dtype(op, "target", target, ScalarType::Long);
  check_range(op, "target", g.target, 0, g.classes);
  return g;
}

// One image's relative logits and what is derived from them; see shapley_cpu_kernel.h.
template <class T>
struct ImageGame {
  int64_t width;
  Workspace<T> relative, growth, start;

  ImageGame(const Kernels<T>& k, int64_t cells, int64_t classes)
      : width((classes + k.tile_cols - 1) / k.tile_cols * k.tile_cols), relative((cells + 1) * width) {}
};

template <class T>
void masked_scores(const Game& g, const Tensor& masks, Value value, Tensor& out) {
  const Kernels<T>& k = cpu_kernels_for<T>();
  const int64_t count = masks.size(0);
  const auto score = [&](int64_t b, ImageGame<T>& image) {
    const MaskedScoresArgs<T> args{g.cell_logits.const_data_ptr<T>() + b * g.cells * g.classes,
                                   g.base_logits.const_data_ptr<T>() + b * g.classes,
                                   image.relative.data(),
                                   masks.const_data_ptr<T>(),
                                   out.mutable_data_ptr<T>() + b * count,
                                   g.cells,
                                   g.classes,
                                   image.width,
                                   g.target.const_data_ptr<int64_t>()[b],
                                   value};
    k.relative(args.cell_logits, args.base_logits, g.cells, g.classes, args.target, image.width, image.relative.data());
    parallel_tiles(count, k.tile_rows, [&](int64_t begin, int64_t end) {
      Workspace<T> scratch((g.cells + image.width) * k.tile_rows);
      k.masked_scores(args, begin, end, scratch.data());
    });
  };
  // Threads share out the images where there are several; the loop over the tiles of one image is then serial.
  parallel_tiles(g.images, 1, [&](int64_t begin, int64_t end) {
    ImageGame<T> image(k, g.cells, g.classes);
    for (int64_t b = begin; b < end; ++b) score(b, image);
  });
}

Tensor masked_class_scores(Tensor cell_logits, Tensor base_logits, Tensor masks, Tensor target, std::string value) {
  const char* op = "masked_class_scores";
  const Value kind = value_named(op, value);
  const Game g = check_game(op, cell_logits, base_logits, target);
  check_rank(op, "masks", masks, 2, "M, P");
  check(masks.size(1) == g.cells, op, ": masks must have shape [M, P = ", g.cells, "], got ", shape_text(masks));
  check_dtype(op, "masks", masks, cell_logits.scalar_type());
  const Tensor rows = to_contiguous(masks);
  Tensor out = empty(cell_logits, {g.images, masks.size(0)}, cell_logits.scalar_type());
  if (out.numel() == 0) return out;
  dispatch_float(op, cell_logits, [&](auto scalar) { masked_scores<decltype(scalar)>(g, rows, kind, out); });
  return out;
}

// Every row must be a permutation of 0..P-1: the kernels index by its entries.
void check_permutations(const char* op, const Tensor& permutations, int64_t cells) {
  const int32_t* order = permutations.const_data_ptr<int32_t>();
  std::vector<int64_t> seen(cells, -1);
  for (int64_t m = 0; m < permutations.size(0); ++m)
    for (int64_t i = 0; i < cells; ++i) {
      const int32_t p = order[m * cells + i];
      check(p >= 0 && p < cells && seen[p] != m, op, ": every row of permutations must hold 0..", cells - 1,
            " once each; row ", m, " does not");
      seen[p] = m;
    }
}

template <class T>
void permutation_tiles(const Game& g, const Tensor& permutations, Value value, bool antithetic, Tensor& mean,
                       Tensor& m2) {
  const Kernels<T>& k = cpu_kernels_for<T>();
  const int64_t count = permutations.size(0), tiles = (count + kShapleyTile - 1) / kShapleyTile;
  ImageGame<T> image(k, g.cells, g.classes);
  double* means = mean.mutable_data_ptr<double>();
  double* squares = m2.mutable_data_ptr<double>();
  for (int64_t b = 0; b < g.images; ++b) {
    const T* cell_logits = g.cell_logits.const_data_ptr<T>() + b * g.cells * g.classes;
    const int64_t target = g.target.const_data_ptr<int64_t>()[b];
    if (value == Value::kLogit) {  // additive: every marginal of cell p is L[p, t]
      for (int64_t i = 0; i < tiles * g.cells; ++i) {
        means[b * tiles * g.cells + i] = double(cell_logits[(i % g.cells) * g.classes + target]);
        squares[b * tiles * g.cells + i] = 0;
      }
      continue;
    }
    k.relative(cell_logits, g.base_logits.const_data_ptr<T>() + b * g.classes, g.cells, g.classes, target, image.width,
               image.relative.data());
    WalkArgs<T> args{image.relative.data(),
                     nullptr,
                     nullptr,
                     permutations.const_data_ptr<int32_t>(),
                     g.cells,
                     image.width,
                     target,
                     value,
                     antithetic,
                     0,
                     k.value_of(image.relative.data() + g.cells * image.width, image.width, target, value)};
    if (value == Value::kProb) {
      image.growth.resize(g.cells * image.width);
      image.start.resize(image.width);
      args.run = k.prepare_walk(image.relative.data(), g.cells, image.width, g.classes, image.growth.data(),
                                image.start.data());
      args.growth = image.growth.data();
      args.start = image.start.data();
    }
    parallel_tiles(tiles, 1, [&](int64_t begin, int64_t end) {
      Workspace<T> scratch(image.width + kShapleyTile * g.cells);
      for (int64_t t = begin; t < end; ++t) {
        const int64_t first = t * kShapleyTile, left = count - first;
        const int64_t at = (b * tiles + t) * g.cells;
        k.walk_tile(args, first, left < kShapleyTile ? left : kShapleyTile, scratch.data(), means + at, squares + at);
      }
    });
  }
}

std::tuple<Tensor, Tensor> permutation_shapley_tiles(Tensor cell_logits, Tensor base_logits, Tensor permutations,
                                                     Tensor target, std::string value, bool antithetic) {
  const char* op = "permutation_shapley_tiles";
  const Value kind = value_named(op, value);
  const Game g = check_game(op, cell_logits, base_logits, target);
  check_rank(op, "permutations", permutations, 2, "M, P");
  check(permutations.size(1) == g.cells, op, ": permutations must have shape [M, P = ", g.cells, "], got ",
        shape_text(permutations));
  check_dtype(op, "permutations", permutations, ScalarType::Int);
  const Tensor orders = to_contiguous(permutations);
  check_permutations(op, orders, g.cells);
  const int64_t tiles = (permutations.size(0) + kShapleyTile - 1) / kShapleyTile;
  Tensor mean = empty(cell_logits, {g.images, tiles, g.cells}, ScalarType::Double);
  Tensor m2 = empty(cell_logits, {g.images, tiles, g.cells}, ScalarType::Double);
  if (mean.numel() == 0) return {mean, m2};
  dispatch_float(op, cell_logits,
                 [&](auto scalar) { permutation_tiles<decltype(scalar)>(g, orders, kind, antithetic, mean, m2); });
  return {mean, m2};
}

}  // namespace
}  // namespace finecf

STABLE_TORCH_LIBRARY_IMPL(finecf, CPU, m) {
  m.impl("masked_class_scores", TORCH_BOX(&finecf::masked_class_scores));
  m.impl("permutation_shapley_tiles", TORCH_BOX(&finecf::permutation_shapley_tiles));
}
