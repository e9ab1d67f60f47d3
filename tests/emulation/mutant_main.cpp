// Runs the fast version of one operator on a small case and compares it with the naive one, which mutants of the fast
// version leave alone. Prints "right", "wrong" or "fault MESSAGE". FINECF_CASE chooses the operator, so that each
// mutant compiles little.
#include <cstdlib>
#include <cstring>
#include <iostream>
#include <random>

#if FINECF_CASE == 2
#include "replacement/replacement_kernel.cuh"
#elif FINECF_CASE == 4
#include "submodular/submodular_kernel.cuh"
#elif FINECF_CASE == 5
#include "regions/regions_kernel.cuh"
#else
#include "shapley/shapley_kernel.cuh"
#endif

namespace {

using finecf::Version;

simt::DeviceArray<float> normal(int64_t count, unsigned seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> draw;
  simt::DeviceArray<float> out(count);
  for (int64_t i = 0; i < count; ++i) out.data()[i] = draw(random);
  return out;
}

template <typename T>
simt::DeviceArray<T> filled(int64_t count, T value) {
  simt::DeviceArray<T> out(count);
  for (int64_t i = 0; i < count; ++i) out.data()[i] = value;
  return out;
}

// Also false for NaN.
bool close(const simt::DeviceArray<float>& a, const simt::DeviceArray<float>& b) {
  for (int64_t i = 0; i < a.size(); ++i)
    if (!(std::fabs(a.data()[i] - b.data()[i]) <= 1e-5f * (1.0f + std::fabs(b.data()[i])))) return false;
  return true;
}

bool right(uint64_t seed) {
  simt::HostLauncher launcher(seed, 232448, 1, 1 << 20);
#if FINECF_CASE == 1  // masked_class_scores: more than one tile of rows, of classes and of depth, none of them whole
  constexpr int64_t kImages = 1, kMasks = 37, kCells = 21, kClasses = 68;
  const auto cell = normal(kImages * kCells * kClasses, 1), base = normal(kImages * kClasses, 2);
  const auto masks = normal(kMasks * kCells, 3);
  const auto target = filled<int64_t>(kImages, 66);
  const simt::DeviceArray<float> fast(kImages * kMasks), naive(kImages * kMasks);
  for (const auto version : {Version::kFast, Version::kNaive}) {
    run_masked_class_scores(launcher, version, static_cast<const float*>(cell.data()), base.data(), masks.data(),
                            target.data(), finecf::Value::kLogOdds, kImages, kMasks, kCells, kClasses,
                            (version == Version::kFast ? fast : naive).data());
  }
  return close(fast, naive);
#elif FINECF_CASE == 2  // best_replacement: every pair alike, so the answer is known, then pairs that differ
  constexpr int64_t kCells = 35, kClasses = 18, kRows = 70;
  const auto cell = normal(kCells * kClasses, 1), candidate = normal(kRows * kClasses, 2),
             similarity = normal(kCells * kRows, 3);
  const auto logits = normal(kClasses, 4), nought = filled<float>(kRows * kRows, 0.0f);
  const auto target = filled<int64_t>(1, 3), range = filled<int64_t>(2, 2);
  range.data()[1] = kRows;
  const auto allowed = filled<unsigned char>(kCells, 1);
  for (const bool alike : {true, false}) {
    const float* const zeros = nought.data();
    const finecf::SearchInput<float> in{alike ? zeros : cell.data(),
                                        alike ? zeros : candidate.data(),
                                        alike ? zeros : similarity.data(),
                                        target.data(),
                                        range.data(),
                                        nullptr,
                                        1,
                                        kRows,
                                        finecf::kNoShortlist,
                                        kCells,
                                        kClasses,
                                        1.0,
                                        1.0};
    const simt::DeviceArray<int64_t> found(4);
    const simt::DeviceArray<float> fast(1), naive(1);
    run_best_replacement(launcher, Version::kFast, in, logits.data(), allowed.data(), nullptr, found.data(),
                         found.data() + 1, fast.data());
    run_best_replacement(launcher, Version::kNaive, in, logits.data(), allowed.data(), nullptr, found.data() + 2,
                         found.data() + 3, naive.data());
    if (!close(fast, naive)) return false;
    if (alike && (found.data()[0] != 0 || found.data()[1] != 2)) return false;
  }
  return true;
#elif FINECF_CASE == 4  // submodular_gains: more than one block of rows and of images; then every row alike
  constexpr int64_t kRows = 37, kImages = 5, kRegions = 40, kClasses = 35;
  const auto insertion = normal(kRows * kClasses, 1), deletion = normal(kRows * kClasses, 2);
  const auto draws = normal(kImages * kRegions * kRegions, 3);
  const simt::DeviceArray<double> distance(kImages * kRegions * kRegions), weights(4);
  for (int64_t i = 0; i < distance.size(); ++i) distance.data()[i] = std::fabs(draws.data()[i]);
  const auto running_min = filled<double>(kImages * kRegions, 0.75), alike = filled<double>(kRows, 0.5);
  const auto selected = filled<unsigned char>(kImages * kRegions, 1);
  const auto target = filled<int64_t>(kImages, 33);
  const simt::DeviceArray<int64_t> image(kRows), candidate(kRows);
  for (int64_t r = 0; r < kRows; ++r) {
    image.data()[r] = r % (kImages - 1);
    candidate.data()[r] = kRows - r;
  }
  for (const bool ties : {false, true}) {
    for (int i = 0; i < 4; ++i) weights.data()[i] = ties && i != 2 ? 0 : 1 + i;
    const finecf::GainsInput<float> in{insertion.data(),
                                       deletion.data(),
                                       image.data(),
                                       candidate.data(),
                                       distance.data(),
                                       running_min.data(),
                                       selected.data(),
                                       target.data(),
                                       weights.data(),
                                       ties ? alike.data() : nullptr,
                                       nullptr,
                                       finecf::Confidence::kEntropy,
                                       kRows,
                                       kImages,
                                       kClasses,
                                       kRegions};
    const simt::DeviceArray<double> fast(kRows * 5), naive(kRows * 5);
    const simt::DeviceArray<int64_t> picked(2 * kImages);
    for (const auto version : {Version::kFast, Version::kNaive}) {
      const bool quick = version == Version::kFast;
      double* const out = (quick ? fast : naive).data();
      run_submodular_gains(launcher, version, in, true, out, out + 4 * kRows, picked.data() + (quick ? 0 : kImages));
    }
    for (int64_t i = 0; i < fast.size(); ++i)
      if (!(std::fabs(fast.data()[i] - naive.data()[i]) <= 1e-12)) return false;
    for (int64_t b = 0; b < kImages; ++b)
      if (picked.data()[b] != picked.data()[kImages + b]) return false;
  }
  return true;
#elif FINECF_CASE == 5  // compose_regions: outputs that choose otherwise in blocks that follow one another
  constexpr int64_t kImages = 2, kOutputs = 3, kChannels = 2, kPixels = 300, kRegions = 70, kSize = kChannels * kPixels;
  const simt::DeviceArray<uint8_t> images(kImages * kSize), baseline(kImages * kSize);
  for (int64_t i = 0; i < images.size(); ++i) {
    images.data()[i] = static_cast<uint8_t>(i % 101);
    baseline.data()[i] = static_cast<uint8_t>(101 + i % 97);
  }
  const simt::DeviceArray<int32_t> labels(kImages * kPixels);
  for (int64_t i = 0; i < labels.size(); ++i) labels.data()[i] = static_cast<int32_t>(i * 37 % kRegions);
  const simt::DeviceArray<int64_t> image(kOutputs);
  const simt::DeviceArray<unsigned char> keep(kOutputs * kRegions);
  for (int64_t i = 0; i < kOutputs; ++i) image.data()[i] = i % kImages;
  for (int64_t i = 0; i < keep.size(); ++i) keep.data()[i] = (i / kRegions + i) % 3 == 0;
  const simt::DeviceArray<uint8_t> fast(2 * kOutputs * kSize), naive(2 * kOutputs * kSize);
  for (const auto version : {Version::kFast, Version::kNaive}) {
    const finecf::Pixels<uint8_t> pixels{
        images.data(), baseline.data(), (version == Version::kFast ? fast : naive).data(), kChannels, kPixels, false,
        false};
    run_compose_regions(launcher, version, pixels, labels.data(), image.data(), keep.data(), kOutputs, kRegions, true);
  }
  return std::memcmp(fast.data(), naive.data(), static_cast<size_t>(fast.size())) == 0;
#else                   // permutation_shapley_tiles: a staged walk, two tiles of samples
  constexpr int64_t kCount = 33, kCells = 9, kClasses = 5;
  const auto cell = normal(kCells * kClasses, 1), base = normal(kClasses, 2);
  const auto target = filled<int64_t>(1, 2);
  const simt::DeviceArray<int32_t> orders(kCount * kCells);
  for (int64_t i = 0; i < kCount * kCells; ++i)
    orders.data()[i] = static_cast<int32_t>((i % kCells * 4 + i / kCells) % kCells);
  const simt::DeviceArray<double> fast(4 * kCells), naive(4 * kCells);
  for (const auto version : {Version::kFast, Version::kNaive}) {
    double* const out = (version == Version::kFast ? fast : naive).data();
    run_permutation_shapley_tiles(launcher, version, static_cast<const float*>(cell.data()), base.data(), orders.data(),
                                  target.data(), finecf::Value::kProb, true, 1, kCount, kCells, kClasses, out,
                                  out + 2 * kCells);
  }
  for (int64_t i = 0; i < fast.size(); ++i)
    if (!(std::fabs(fast.data()[i] - naive.data()[i]) <= 1e-6)) return false;
  return true;
#endif
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 2) return 2;
  try {
    std::cout << (right(std::strtoull(argv[1], nullptr, 10)) ? "right" : "wrong") << "\n";
  } catch (const simt::Fault& fault) {
    std::cout << "fault " << fault.what() << "\n";
  }
}
