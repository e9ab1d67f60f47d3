// `_finecf_emulated`: the CUDA kernels, unmodified, on the host. For tests; numpy in and out, no torch.
//
// The operators have the names and arguments of csrc/bindings.cpp, and these besides:
//   seed           order in which threads and blocks run; results must not depend on it
//   version        "fast" or "naive"
//   shared_limit   bytes of shared memory a block may have, so that both staging paths can be run
//   processors     multiprocessors to plan the grid for
//   scratch        bytes of scratch to plan for, so that work is cut into chunks
//   only_plan      note the launches and run none: results are NaN bytes
// Floating-point inputs are float32; cell_logits, candidate_logits, similarity, query, bank and both logits of
// submodular_gains may be float16, or uint16 arrays that hold bfloat16 bits. Its other numbers are float64. The images
// of the `regions` operators may have elements of any type of 1, 2, 4 or 8 bytes; with channels_last they come and go
// as they lie in memory, [B, H, W, Ch]. Every array is copied to memory that ends at a guard page. A fault of a kernel
// is a RuntimeError that names kernel, block, thread and line. `kernels()` and `launches()` list what the last call
// ran.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <string>

#include "../regions/regions_kernel.cuh"
#include "../replacement/replacement_kernel.cuh"
#include "../shapley/shapley_kernel.cuh"
#include "../shapley/shapley_value.h"
#include "../submodular/confidence_name.h"
#include "../submodular/submodular_kernel.cuh"

namespace py = pybind11;

namespace finecf {
namespace {

std::vector<simt::Launch> last_launches;

struct Plan {
  uint64_t seed;
  std::string version;
  size_t shared_limit;
  int processors;
  size_t scratch;
  bool only_plan;
};

Version parse_version(const std::string& name) {
  if (name == "naive") return Version::kNaive;
  if (name == "fast") return Version::kFast;
  throw py::value_error("version must be \"naive\" or \"fast\", got \"" + name + "\"");
}

// Runs `work(launcher, version)` and remembers which kernels it used.
template <typename Work>
void with_launcher(const Plan& plan, Work work) {
  simt::HostLauncher launcher(plan.seed, plan.shared_limit, plan.processors, plan.scratch, plan.only_plan);
  work(launcher, parse_version(plan.version));
  last_launches = launcher.launches();
}

void expect_shape(const char* name, const py::array& array, std::initializer_list<int64_t> shape) {
  bool same = array.ndim() == static_cast<py::ssize_t>(shape.size());
  std::string wanted, came;
  int axis = 0;
  for (const int64_t size : shape) {
    same = same && array.shape(axis) == size;
    wanted += (axis ? ", " : "") + std::to_string(size);
    ++axis;
  }
  for (axis = 0; axis < array.ndim(); ++axis) came += (axis ? ", " : "") + std::to_string(array.shape(axis));
  if (!same) throw py::value_error(std::string(name) + " must have shape [" + wanted + "], got [" + came + "]");
}

// A numpy array as the device would hold it.
template <typename T, typename Element = T>
simt::DeviceArray<Element> upload(const py::array& array) {
  static_assert(sizeof(T) == sizeof(Element));
  const auto same = py::array_t<T, py::array::c_style>::ensure(array);
  if (!same) throw py::error_already_set();
  return simt::DeviceArray<Element>(reinterpret_cast<const Element*>(same.data()), same.size());
}

template <typename T>
py::array_t<T> download(const simt::DeviceArray<T>& array, std::vector<py::ssize_t> shape) {
  py::array_t<T> out(shape);
  std::memcpy(out.mutable_data(), array.data(), static_cast<size_t>(array.size()) * sizeof(T));
  return out;
}

simt::DeviceArray<unsigned char> upload_flags(const py::array& array) { return upload<bool, unsigned char>(array); }

// Calls work(upload function) for the element type of `like`.
template <typename Work>
auto dispatch(const py::array& like, Work work) {
  const char kind = like.dtype().kind();
  const auto size = like.itemsize();
  if (kind == 'f' && size == 4) return work([](const py::array& a) { return upload<float>(a); });
  if (kind == 'f' && size == 2) {
    return work(
        [](const py::array& a) { return upload<uint16_t, half_t>(a.attr("view")("uint16").cast<py::array>()); });
  }
  if (kind == 'u' && size == 2) return work([](const py::array& a) { return upload<uint16_t, bfloat16_t>(a); });
  throw py::type_error("expected float32, float16 or bfloat16 bits as uint16, got " +
                       std::string(py::str(like.dtype())));
}

py::array masked_class_scores(const py::array& cell_logits, const py::array& base_logits, const py::array& masks,
                              const py::array& target, const std::string& value, const Plan& plan) {
  if (cell_logits.ndim() != 3 || masks.ndim() != 2)
    throw py::value_error("cell_logits must be [B, P, C] and masks [M, P]");
  const int64_t images = cell_logits.shape(0), cells = cell_logits.shape(1), classes = cell_logits.shape(2);
  const int64_t count = masks.shape(0);
  expect_shape("base_logits", base_logits, {images, classes});
  expect_shape("masks", masks, {count, cells});
  expect_shape("target", target, {images});
  const auto base = upload<float>(base_logits), rows = upload<float>(masks);
  const auto chosen = upload<int64_t>(target);
  const simt::DeviceArray<float> scores(images * count);
  dispatch(cell_logits, [&](auto send) {
    const auto cell = send(cell_logits);
    with_launcher(plan, [&](auto& launcher, Version version) {
      run_masked_class_scores(launcher, version, cell.data(), base.data(), rows.data(), chosen.data(),
                              value_named("masked_class_scores", value), images, count, cells, classes, scores.data());
    });
  });
  return download(scores, {images, count});
}

py::tuple permutation_shapley_tiles(const py::array& cell_logits, const py::array& base_logits,
                                    const py::array& permutations, const py::array& target, const std::string& value,
                                    bool antithetic, const Plan& plan) {
  if (cell_logits.ndim() != 3 || permutations.ndim() != 2)
    throw py::value_error("cell_logits must be [B, P, C] and permutations [M, P]");
  const int64_t images = cell_logits.shape(0), cells = cell_logits.shape(1), classes = cell_logits.shape(2);
  const int64_t count = permutations.shape(0), tiles = ceil_div(count, kShapleyTile);
  expect_shape("base_logits", base_logits, {images, classes});
  expect_shape("permutations", permutations, {count, cells});
  expect_shape("target", target, {images});
  const auto base = upload<float>(base_logits);
  const auto orders = upload<int32_t>(permutations);
  const auto chosen = upload<int64_t>(target);
  const simt::DeviceArray<double> mean(images * tiles * cells), m2(images * tiles * cells);
  dispatch(cell_logits, [&](auto send) {
    const auto cell = send(cell_logits);
    with_launcher(plan, [&](auto& launcher, Version version) {
      run_permutation_shapley_tiles(launcher, version, cell.data(), base.data(), orders.data(), chosen.data(),
                                    value_named("permutation_shapley_tiles", value), antithetic, images, count, cells,
                                    classes, mean.data(), m2.data());
    });
  });
  return py::make_tuple(download(mean, {images, tiles, cells}), download(m2, {images, tiles, cells}));
}

py::tuple nearest_candidates(const py::array& query, const py::array& bank, int64_t k, const Plan& plan) {
  if (query.ndim() != 2 || bank.ndim() != 2) throw py::value_error("query must be [P, D] and bank [N, D]");
  const int64_t queries = query.shape(0), width = query.shape(1), count = bank.shape(0);
  expect_shape("bank", bank, {count, width});
  if (k < 1 || k > count) throw py::value_error("k must be between 1 and the number of bank rows");
  const simt::DeviceArray<float> cosine(queries * k);
  const simt::DeviceArray<int64_t> index(queries * k);
  dispatch(query, [&](auto send) {
    const auto left = send(query), right = send(bank);
    with_launcher(plan, [&](auto& launcher, Version version) {
      run_nearest_candidates(launcher, version, left.data(), right.data(), queries, count, width, k, cosine.data(),
                             index.data());
    });
  });
  return py::make_tuple(download(cosine, {queries, k}), download(index, {queries, k}));
}

// The arrays that both searches share, on the emulated device.
template <typename Send>
struct Upload {
  using Array = decltype(std::declval<Send>()(std::declval<py::array>()));
  Array cell_logits, candidate_logits, similarity;
  simt::DeviceArray<int64_t> target, range;
  std::optional<simt::DeviceArray<int64_t>> shortlist;
  int64_t images, cells, classes, candidates, listed = kNoShortlist;

  Upload(Send send, const py::array& cell, const py::array& candidate, const py::array& similar,
         const py::array& chosen, const py::array& rows, const std::optional<py::array>& list)
      : cell_logits(send(cell)),
        candidate_logits(send(candidate)),
        similarity(send(similar)),
        target(upload<int64_t>(chosen)),
        range(upload<int64_t>(rows)) {
    if (cell.ndim() != 3 || candidate.ndim() != 2)
      throw py::value_error("cell_logits must be [B, P, C] and candidate_logits [N, C]");
    images = cell.shape(0), cells = cell.shape(1), classes = cell.shape(2), candidates = candidate.shape(0);
    expect_shape("candidate_logits", candidate, {candidates, classes});
    expect_shape("similarity", similar, {images, cells, candidates});
    expect_shape("target", chosen, {images});
    expect_shape("candidate_range", rows, {images, 2});
    if (list) {
      if (list->ndim() != 3) throw py::value_error("shortlist must be [B, P, K]");
      listed = list->shape(2);
      expect_shape("shortlist", *list, {images, cells, listed});
      shortlist.emplace(
          reinterpret_cast<const int64_t*>(py::array_t<int64_t, py::array::c_style>::ensure(*list).data()),
          images * cells * listed);
    }
  }

  auto input(double weight_sim, double weight_cls) const {
    using T = std::remove_pointer_t<decltype(cell_logits.data())>;
    return SearchInput<T>{cell_logits.data(),
                          candidate_logits.data(),
                          similarity.data(),
                          target.data(),
                          range.data(),
                          shortlist ? shortlist->data() : nullptr,
                          images,
                          candidates,
                          listed,
                          static_cast<int>(cells),
                          static_cast<int>(classes),
                          weight_sim,
                          weight_cls};
  }
};

py::tuple best_replacement(const py::array& cell_logits, const py::array& candidate_logits, const py::array& similarity,
                           const py::array& logits, const py::array& target, const py::array& allowed,
                           const py::array& candidate_range, const std::optional<py::array>& shortlist,
                           const std::optional<py::array>& used, double weight_sim, double weight_cls,
                           const Plan& plan) {
  const int64_t images = target.size();
  const auto now = upload<float>(logits);
  const auto open = upload_flags(allowed);
  std::optional<simt::DeviceArray<unsigned char>> spent;
  if (used) spent.emplace(upload_flags(*used).data(), used->size());
  const simt::DeviceArray<int64_t> cell(images), candidate(images);
  const simt::DeviceArray<float> loss(images);
  dispatch(cell_logits, [&](auto send) {
    const Upload<decltype(send)> arrays(send, cell_logits, candidate_logits, similarity, target, candidate_range,
                                        shortlist);
    expect_shape("logits", logits, {arrays.images, arrays.classes});
    expect_shape("allowed", allowed, {arrays.images, arrays.cells});
    if (used) expect_shape("used", *used, {arrays.images, arrays.candidates});
    with_launcher(plan, [&](auto& launcher, Version version) {
      run_best_replacement(launcher, version, arrays.input(weight_sim, weight_cls), now.data(), open.data(),
                           spent ? spent->data() : nullptr, cell.data(), candidate.data(), loss.data());
    });
  });
  return py::make_tuple(download(cell, {images}), download(candidate, {images}), download(loss, {images}));
}

py::tuple replace_until_flip(const py::array& cell_logits, const py::array& candidate_logits,
                             const py::array& similarity, const py::array& base_logits, const py::array& target,
                             const py::array& cell_scores, const py::array& candidate_range,
                             const std::optional<py::array>& shortlist, int64_t top_cells, int64_t max_edits,
                             bool reuse_candidates, double weight_sim, double weight_cls, const Plan& plan) {
  if (cell_logits.ndim() != 3) throw py::value_error("cell_logits must be [B, P, C]");
  const int64_t images = cell_logits.shape(0), cells = cell_logits.shape(1), classes = cell_logits.shape(2);
  expect_shape("base_logits", base_logits, {images, classes});
  expect_shape("cell_scores", cell_scores, {images, cells});
  const auto base = upload<float>(base_logits), scores = upload<float>(cell_scores);
  const simt::DeviceArray<int64_t> edited(images * max_edits), taken(images * max_edits), n_edits(images);
  const simt::DeviceArray<float> losses(images * max_edits), path(images * (max_edits + 1) * classes);
  const simt::DeviceArray<unsigned char> flipped(images);
  SearchResult result{};
  result.cells = edited.data();
  result.candidates = taken.data();
  result.losses = losses.data();
  result.logits = path.data();
  result.n_edits = n_edits.data();
  result.flipped = flipped.data();
  result.max_edits = max_edits;
  result.top_cells = static_cast<int>(top_cells < cells ? top_cells : cells);
  dispatch(cell_logits, [&](auto send) {
    const Upload<decltype(send)> arrays(send, cell_logits, candidate_logits, similarity, target, candidate_range,
                                        shortlist);
    with_launcher(plan, [&](auto& launcher, Version version) {
      run_replace_until_flip(launcher, version, arrays.input(weight_sim, weight_cls), base.data(), scores.data(),
                             reuse_candidates, result);
    });
  });
  return py::make_tuple(download(edited, {images, max_edits}), download(taken, {images, max_edits}),
                        download(losses, {images, max_edits}), download(path, {images, max_edits + 1, classes}),
                        download(n_edits, {images}), download(flipped, {images}).attr("astype")("bool"));
}

py::tuple submodular_gains(const py::array& insertion_logits, const std::optional<py::array>& deletion_logits,
                           const py::array& image, const py::array& candidate, const py::array& distance,
                           const py::array& running_min, const py::array& selected, const py::array& target,
                           const py::array& weights, const std::string& confidence,
                           const std::optional<py::array>& consistency, const std::optional<py::array>& collaboration,
                           bool largest, const Plan& plan) {
  if (insertion_logits.ndim() != 2 || distance.ndim() != 3)
    throw py::value_error("insertion_logits must be [R, C] and distance [B, m, m]");
  const int64_t rows = insertion_logits.shape(0), classes = insertion_logits.shape(1);
  const int64_t images = distance.shape(0), regions = distance.shape(1);
  if (deletion_logits) expect_shape("deletion_logits", *deletion_logits, {rows, classes});
  expect_shape("image", image, {rows});
  expect_shape("candidate", candidate, {rows});
  expect_shape("distance", distance, {images, regions, regions});
  expect_shape("running_min", running_min, {images, regions});
  expect_shape("selected", selected, {images, regions});
  expect_shape("target", target, {images});
  expect_shape("weights", weights, {kSubmodularTerms});
  const auto of = upload<int64_t>(image), added = upload<int64_t>(candidate), chosen = upload<int64_t>(target);
  const auto apart = upload<double>(distance), nearest = upload<double>(running_min), weight = upload<double>(weights);
  const auto in_set = upload_flags(selected);
  const auto given = [&](const char* name, const std::optional<py::array>& numbers) {
    if (numbers) expect_shape(name, *numbers, {rows});
    return upload<double>(numbers ? *numbers : py::array_t<double>(0));
  };
  const auto kept = given("consistency", consistency), removed = given("collaboration", collaboration);
  const simt::DeviceArray<double> scores(rows * kSubmodularTerms), total(rows);
  const simt::DeviceArray<int64_t> best(images);
  dispatch(insertion_logits, [&](auto send) {
    const auto insertion = send(insertion_logits);
    const auto deletion = send(deletion_logits ? *deletion_logits : insertion_logits);
    using T = std::remove_pointer_t<decltype(insertion.data())>;
    const GainsInput<T> in{insertion.data(),
                           deletion_logits ? deletion.data() : nullptr,
                           of.data(),
                           added.data(),
                           apart.data(),
                           nearest.data(),
                           in_set.data(),
                           chosen.data(),
                           weight.data(),
                           consistency ? kept.data() : nullptr,
                           collaboration ? removed.data() : nullptr,
                           confidence_named("submodular_gains", confidence),
                           rows,
                           images,
                           static_cast<int>(classes),
                           static_cast<int>(regions)};
    with_launcher(plan, [&](auto& launcher, Version version) {
      run_submodular_gains(launcher, version, in, largest, scores.data(), total.data(), best.data());
    });
  });
  return py::make_tuple(download(scores, {rows, kSubmodularTerms}), download(total, {rows}), download(best, {images}));
}

// Images and a baseline of the `regions` operators on the emulated device, as elements of an unsigned type T, and room
// for `rows` outputs.
template <typename T>
struct Pictures {
  simt::DeviceArray<T> images, baseline, out;
  std::vector<py::ssize_t> shape;
  py::dtype type;
  Pixels<T> pixels;

  Pictures(const py::array& pictures, const py::array& base, int64_t rows, bool channels_last)
      : images(bits(pictures)),
        baseline(bits(base)),
        out(rows * pictures.size() / pictures.shape(0)),
        shape(pictures.shape(), pictures.shape() + 4),
        type(pictures.dtype()) {
    const int64_t channels = shape[channels_last ? 3 : 1];
    const bool one_colour = base.ndim() == 1;
    if (one_colour) expect_shape("baseline", base, {channels});
    if (!one_colour) expect_shape("baseline", base, {shape[0], shape[1], shape[2], shape[3]});
    const int64_t size = pictures.size() / pictures.shape(0);
    pixels = {images.data(), baseline.data(), out.data(), channels, size / channels, one_colour, channels_last};
    shape[0] = rows;
  }

  py::object result() const { return download(out, shape).attr("view")(type); }

 private:
  static simt::DeviceArray<T> bits(const py::array& array) {
    return upload<T>(array.attr("view")(py::dtype::of<T>()).template cast<py::array>());
  }
};

// Calls work(a zero of the unsigned type as wide as the elements) and returns what it returns.
template <typename Work>
py::object dispatch_width(const py::array& images, Work work) {
  if (images.ndim() != 4 || images.size() == 0) throw py::value_error("images must be four axes, none of them empty");
  switch (images.itemsize()) {
    case 1:
      return work(uint8_t{0});
    case 2:
      return work(uint16_t{0});
    case 4:
      return work(uint32_t{0});
    case 8:
      return work(uint64_t{0});
    default:
      throw py::type_error("images must have elements of 1, 2, 4 or 8 bytes, got " +
                           std::string(py::str(images.dtype())));
  }
}

py::object compose_regions(const py::array& images, const py::array& labels, const py::array& image,
                           const py::array& keep, const py::array& baseline, bool complement, bool channels_last,
                           const Plan& plan) {
  return dispatch_width(images, [&](auto zero) {
    using T = decltype(zero);
    const int64_t outputs = image.size(), height = images.shape(channels_last ? 1 : 2);
    expect_shape("labels", labels, {images.shape(0), height, images.shape(channels_last ? 2 : 3)});
    if (keep.ndim() != 2) throw py::value_error("keep must be [n, m]");
    const int64_t regions = keep.shape(1);
    expect_shape("keep", keep, {outputs, regions});
    const auto map = upload<int32_t>(labels);
    const auto of = upload<int64_t>(image);
    const auto kept = upload_flags(keep);
    const Pictures<T> pictures(images, baseline, complement ? 2 * outputs : outputs, channels_last);
    with_launcher(plan, [&](auto& launcher, Version version) {
      run_compose_regions(launcher, version, pictures.pixels, map.data(), of.data(), kept.data(), outputs, regions,
                          complement);
    });
    return pictures.result();
  });
}

// Has no naive version: each thread does what it does alone.
py::object rank_masks(const py::array& images, const py::array& rank, const py::array& image,
                      const py::array& threshold, const py::array& baseline, bool insert, const Plan& plan) {
  return dispatch_width(images, [&](auto zero) {
    using T = decltype(zero);
    const int64_t outputs = image.size();
    expect_shape("rank", rank, {images.shape(0), images.shape(2), images.shape(3)});
    expect_shape("threshold", threshold, {outputs});
    const auto place = upload<int32_t>(rank), limit = upload<int32_t>(threshold);
    const auto of = upload<int64_t>(image);
    const Pictures<T> pictures(images, baseline, outputs, false);
    with_launcher(plan, [&](auto& launcher, Version) {
      run_rank_masks(launcher, pictures.pixels, place.data(), of.data(), limit.data(), outputs, insert);
    });
    return pictures.result();
  });
}

}  // namespace
}  // namespace finecf

PYBIND11_MODULE(_finecf_emulated, m) {
  using finecf::Plan;
  m.doc() = "The CUDA kernels of finecf, unmodified, on the host: numpy in and out, for tests.";
  py::class_<Plan>(m, "Plan", "How to run a launch: see csrc/emulation/module.cpp.")
      .def(py::init([](uint64_t seed, std::string version, size_t shared_limit, int processors, size_t scratch,
                       bool only_plan) {
             return Plan{seed, std::move(version), shared_limit, processors, scratch, only_plan};
           }),
           py::kw_only(), py::arg("seed") = 0, py::arg("version") = "fast", py::arg("shared_limit") = 232448,
           py::arg("processors") = 2, py::arg("scratch") = size_t{64} << 20, py::arg("only_plan") = false);
  m.def("masked_class_scores", &finecf::masked_class_scores, py::arg("cell_logits"), py::arg("base_logits"),
        py::arg("masks"), py::arg("target"), py::arg("value"), py::arg("plan"));
  m.def("permutation_shapley_tiles", &finecf::permutation_shapley_tiles, py::arg("cell_logits"), py::arg("base_logits"),
        py::arg("permutations"), py::arg("target"), py::arg("value"), py::arg("antithetic"), py::arg("plan"));
  m.def("nearest_candidates", &finecf::nearest_candidates, py::arg("query"), py::arg("bank"), py::arg("k"),
        py::arg("plan"));
  m.def("best_replacement", &finecf::best_replacement, py::arg("cell_logits"), py::arg("candidate_logits"),
        py::arg("similarity"), py::arg("logits"), py::arg("target"), py::arg("allowed"), py::arg("candidate_range"),
        py::arg("shortlist"), py::arg("used"), py::arg("weight_sim"), py::arg("weight_cls"), py::arg("plan"));
  m.def("replace_until_flip", &finecf::replace_until_flip, py::arg("cell_logits"), py::arg("candidate_logits"),
        py::arg("similarity"), py::arg("base_logits"), py::arg("target"), py::arg("cell_scores"),
        py::arg("candidate_range"), py::arg("shortlist"), py::arg("top_cells"), py::arg("max_edits"),
        py::arg("reuse_candidates"), py::arg("weight_sim"), py::arg("weight_cls"), py::arg("plan"));
  m.def("submodular_gains", &finecf::submodular_gains, py::arg("insertion_logits"), py::arg("deletion_logits"),
        py::arg("image"), py::arg("candidate"), py::arg("distance"), py::arg("running_min"), py::arg("selected"),
        py::arg("target"), py::arg("weights"), py::arg("confidence"), py::arg("consistency"), py::arg("collaboration"),
        py::arg("largest"), py::arg("plan"));
  m.def("compose_regions", &finecf::compose_regions, py::arg("images"), py::arg("labels"), py::arg("image"),
        py::arg("keep"), py::arg("baseline"), py::arg("complement"), py::arg("channels_last"), py::arg("plan"));
  m.def("rank_masks", &finecf::rank_masks, py::arg("images"), py::arg("rank"), py::arg("image"), py::arg("threshold"),
        py::arg("baseline"), py::arg("insert"), py::arg("plan"));
  m.def(
      "kernels",
      [] {
        std::vector<std::string> names;
        for (const auto& launch : finecf::last_launches) names.push_back(launch.kernel);
        return names;
      },
      "Names of the kernels that the last call ran, in order.");
  m.def(
      "launches",
      [] {
        py::list all;
        for (const auto& launch : finecf::last_launches)
          all.append(py::make_tuple(launch.kernel, launch.grid, launch.block, launch.dynamic_bytes));
        return all;
      },
      "The same with their sizes: (kernel, blocks, threads of a block, bytes of dynamic shared memory).");
}
