// CPU entry points of the `replacement` operators: checks, workspaces, threads, and the search itself. The contract is
// in replacement.h, the kernels in replacement_cpu_kernel.h.
#include "replacement.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <memory>
#include <mutex>
#include <numeric>
#include <vector>

#include "../common/checks.h"
#include "../common/isa.h"
#include "../common/workspace.h"

namespace finecf {
namespace {

// ---- nearest_candidates -------------------------------------------------------------------------------------------

constexpr int64_t kBankChunk = 4096;  // bank rows whose cosines are held at a time

template <class T>
struct Neighbour {
  T cosine;
  int64_t index;
  bool operator<(const Neighbour& other) const {
    return cosine > other.cosine || (cosine == other.cosine && index < other.index);
  }
};

template <class T>
void nearest(const Tensor& query, const Tensor& bank, int64_t k, Tensor& cosine, Tensor& index) {
  const Kernels<T>& kernels = cpu_kernels_for<T>();
  const int64_t queries = query.size(0), count = bank.size(0), width = query.size(1);
  const T* q = query.const_data_ptr<T>();
  Workspace<T> scale(queries), block(queries * std::min(count, kBankChunk));
  kernels.inverse_norms(q, queries, width, scale.data());
  std::vector<std::vector<Neighbour<T>>> best(queries);
  for (int64_t n0 = 0; n0 < count; n0 += kBankChunk) {
    const int64_t rows = std::min(kBankChunk, count - n0);
    parallel_tiles(rows, 96, [&](int64_t begin, int64_t end) {
      Workspace<T> scratch((queries + kernels.dot_rows) * kernels.dot_cols * kernels.lanes);
      kernels.cosine_block(q, scale.data(), queries, bank.const_data_ptr<T>() + (n0 + begin) * width, end - begin,
                           width, block.data() + begin, rows, scratch.data());
    });
    parallel_tiles(queries, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        std::vector<Neighbour<T>>& kept = best[i];
        // `kept` is in no order; once it holds k, only what beats its k-th best may join. Pruned when it doubles.
        const auto prune = [&] {
          std::nth_element(kept.begin(), kept.begin() + (k - 1), kept.end());
          kept.resize(k);
        };
        T bar = -std::numeric_limits<T>::infinity();
        if (int64_t(kept.size()) >= k) {
          prune();
          bar = kept[k - 1].cosine;
        }
        const T* row = block.data() + i * rows;
        for (int64_t n = 0; n < rows; ++n) {
          if (!(row[n] > bar)) continue;  // an equal cosine at a later row loses the tie
          kept.push_back({row[n], n0 + n});
          if (int64_t(kept.size()) >= 2 * k + 64) {
            prune();
            bar = kept[k - 1].cosine;
          }
        }
      }
    });
  }
  T* cosines = cosine.mutable_data_ptr<T>();
  int64_t* indices = index.mutable_data_ptr<int64_t>();
  for (int64_t i = 0; i < queries; ++i) {
    // A cosine that is no number joins nothing: with NaN, infinity or overflow in the rows too few may be left.
    check(int64_t(best[i].size()) >= k, "nearest_candidates: query and bank must be finite, and small enough that ",
          "their products are, got rows without a cosine for query ", i);
    std::partial_sort(best[i].begin(), best[i].begin() + k, best[i].end());
    for (int64_t j = 0; j < k; ++j) {
      cosines[i * k + j] = best[i][j].cosine;
      indices[i * k + j] = best[i][j].index;
    }
  }
}

std::tuple<Tensor, Tensor> nearest_candidates(Tensor query, Tensor bank, int64_t k) {
  const char* op = "nearest_candidates";
  check_rank(op, "query", query, 2, "P, D");
  check_rank(op, "bank", bank, 2, "N, D");
  check_float(op, "query", query);
  check_dtype(op, "bank", bank, query.scalar_type());
  check(bank.size(1) == query.size(1), op, ": bank must have the width of query, ", query.size(1), ", got ",
        shape_text(bank));
  check(k >= 1 && k <= bank.size(0), op, ": k must be between 1 and the number of bank rows, ", bank.size(0), ", got ",
        k);
  Tensor cosine = empty(query, {query.size(0), k}, query.scalar_type());
  Tensor index = empty(query, {query.size(0), k}, ScalarType::Long);
  if (cosine.numel() == 0) return {cosine, index};
  const Tensor q = to_contiguous(query), rows = to_contiguous(bank);
  dispatch_float(op, query, [&](auto scalar) { nearest<decltype(scalar)>(q, rows, k, cosine, index); });
  return {cosine, index};
}

// ---- the search ---------------------------------------------------------------------------------------------------

struct Problem {
  Tensor cell_logits, candidate_logits, similarity, target, range;
  std::optional<Tensor> shortlist;
  int64_t images, cells, classes, candidates, listed;  // listed: K of the shortlist
  double weight_sim, weight_cls;
};

Problem check_problem(const char* op, const Tensor& cell_logits, const Tensor& candidate_logits,
                      const Tensor& similarity, const Tensor& target, const Tensor& range,
                      const std::optional<Tensor>& shortlist, double weight_sim, double weight_cls) {
  check_rank(op, "cell_logits", cell_logits, 3, "B, P, C");
  check_float(op, "cell_logits", cell_logits);
  const ScalarType dtype = cell_logits.scalar_type();
  check_rank(op, "candidate_logits", candidate_logits, 2, "N, C");
  Problem p{to_contiguous(cell_logits),
            to_contiguous(candidate_logits),
            to_contiguous(similarity),
            to_contiguous(target),
            to_contiguous(range),
            std::nullopt,
            cell_logits.size(0),
            cell_logits.size(1),
            cell_logits.size(2),
            candidate_logits.size(0),
            0,
            weight_sim,
            weight_cls};
  check(p.classes >= 2, op, ": cell_logits must have at least 2 classes, got shape ", shape_text(cell_logits));
  check_shape(op, "candidate_logits", candidate_logits, {p.candidates, p.classes}, "N, C");
  check_dtype(op, "candidate_logits", candidate_logits, dtype);
  check_shape(op, "similarity", similarity, {p.images, p.cells, p.candidates}, "B, P, N");
  check_dtype(op, "similarity", similarity, dtype);
  check_shape(op, "target", target, {p.images}, "B");
  check_dtype(op, "target", target, ScalarType::Long);
  check_range(op, "target", p.target, 0, p.classes);
  check_shape(op, "candidate_range", range, {p.images, 2}, "B, 2");
  check_dtype(op, "candidate_range", range, ScalarType::Long);
  check_range(op, "candidate_range", p.range, 0, p.candidates + 1);
  if (shortlist) {
    check_rank(op, "shortlist", *shortlist, 3, "B, P, K");
    p.listed = shortlist->size(2);
    check_shape(op, "shortlist", *shortlist, {p.images, p.cells, p.listed}, "B, P, K");
    check_dtype(op, "shortlist", *shortlist, ScalarType::Long);
    p.shortlist = to_contiguous(*shortlist);
  }
  check(std::isfinite(weight_sim) && std::isfinite(weight_cls) && weight_sim >= 0 && weight_cls >= 0, op,
        ": weight_sim and weight_cls must be finite and not negative, got ", weight_sim, " and ", weight_cls);
  return p;
}

void grow_pairs(PairList* list, int64_t more, double limit);

// Storage of a PairList.
struct PairStore : PairList {
  std::vector<Pair> memory;
  PairStore() : PairList{nullptr, 0, 0, grow_pairs}, memory(1024) {
    data = memory.data();
    capacity = int64_t(memory.size());
  }
};

// Drops the pairs whose factorised loss is above `limit`.
void drop_pairs(PairList& list, double limit) {
  const auto ruled_out = [&](const Pair& p) { return !p.keep && p.loss > limit; };
  list.size = std::remove_if(list.data, list.data + list.size, ruled_out) - list.data;
}

void grow_pairs(PairList* list, int64_t more, double limit) {
  PairStore* store = static_cast<PairStore*>(list);
  drop_pairs(*store, limit);
  // Grown while still half full, so that the cost of dropping stays proportional to what joins.
  if (store->size + more > store->capacity / 2) {
    store->memory.resize(2 * (store->capacity + more));
    store->data = store->memory.data();
    store->capacity = int64_t(store->memory.size());
  }
}

struct Choice {
  int64_t cell = -1, candidate = -1;
  double loss = std::numeric_limits<double>::infinity();
  bool better_than(const Choice& o) const {
    if (loss != o.loss) return loss < o.loss;
    if (cell != o.cell) return cell < o.cell;
    return candidate < o.candidate;
  }
  void take(const Choice& o) {
    if (o.better_than(*this)) *this = o;
  }
  // The best of scored pairs.
  void take(const Pair* pairs, int64_t count, const std::vector<int64_t>& cells) {
    for (int64_t i = 0; i < count; ++i) take(Choice{cells[pairs[i].row], pairs[i].candidate, pairs[i].loss});
  }
};

// Below this many pairs an edit scores them all directly: cheaper than one panel of the factorised scan.
constexpr int64_t kDirectPairs = 512;
// A thread of the scan that holds more pairs than this scores them: memory stays bounded where every pair is a tie.
constexpr int64_t kPairsHeld = int64_t(1) << 16;
// Packed factors of the candidates beyond this are not kept but made again panel by panel at every edit.
std::atomic<int64_t> packed_limit{int64_t(512) << 20};

// The candidates' side of the factorisation: panels over the rows [first, last) that any image of the batch may use, of
// which those are packed that one does use. Images of far classes share a wide range and few panels.
template <class T>
class CandidatePanels {
 public:
  CandidatePanels(const Problem& p, int64_t first, int64_t last)
      : kernels_(cpu_kernels_for<T>()),
        rows_(p.candidate_logits.const_data_ptr<T>()),
        classes_(p.classes),
        first_(first),
        last_(last),
        count_(last > first ? panel_past(last) : 0),
        slot_(count_, -1),
        row_max_(count_ * kernels_.tile_cols) {
    const int64_t* range = p.range.const_data_ptr<int64_t>();
    for (int64_t b = 0; b < p.images; ++b)
      if (range[2 * b] < range[2 * b + 1])
        std::fill(slot_.begin() + panel_of(range[2 * b]), slot_.begin() + panel_past(range[2 * b + 1]), 0);
    std::vector<int64_t> needed;
    for (int64_t i = 0; i < count_; ++i)
      if (slot_[i] == 0) {
        slot_[i] = int64_t(needed.size());
        needed.push_back(i);
      }
    const int64_t panel = classes_ * kernels_.tile_cols, packed = int64_t(needed.size()) * panel;
    kept_ = packed * int64_t(sizeof(T)) <= packed_limit.load(std::memory_order_relaxed);
    if (kept_) packed_.resize(packed);
    std::mutex guard;
    parallel_tiles(int64_t(needed.size()), 1, [&](int64_t begin, int64_t end) {
      Workspace<T> scratch(row_scratch()), once(kept_ ? 0 : panel);
      T most = 0;
      for (int64_t i = begin; i < end; ++i)
        most = std::max(most, pack(needed[i], kept_ ? packed_.data() + i * panel : once.data(),
                                   row_max_.data() + needed[i] * kernels_.tile_cols, scratch.data()));
      const std::lock_guard<std::mutex> lock(guard);
      magnitude_ = std::max(magnitude_, double(most));
    });
  }

  // The panels that hold rows [begin, end): from the first's to past the last's.
  int64_t panel_of(int64_t begin) const { return (begin - first_) / kernels_.tile_cols; }
  int64_t panel_past(int64_t end) const { return (end - first_ + kernels_.tile_cols - 1) / kernels_.tile_cols; }
  int64_t first_row(int64_t panel) const { return first_ + panel * kernels_.tile_cols; }
  T row_max(int64_t row) { return row_max_.data()[row - first_]; }
  double magnitude() const { return magnitude_; }  // of the candidates' logits

  // One panel, from store or made in `scratch` [panel_scratch()].
  const T* panel(int64_t i, T* scratch) {
    const int64_t panel = classes_ * kernels_.tile_cols;
    if (kept_) return packed_.data() + slot_[i] * panel;
    pack(i, scratch, scratch + panel, scratch + panel + kernels_.tile_cols);
    return scratch;
  }
  int64_t panel_scratch() const { return kept_ ? 0 : (classes_ + 1) * kernels_.tile_cols + row_scratch(); }

 private:
  int64_t row_scratch() const { return kernels_.lanes * (classes_ + kernels_.lanes); }

  T pack(int64_t i, T* panel, T* row_max, T* scratch) const {
    const int64_t start = first_row(i);
    return kernels_.pack_panel(rows_ + start * classes_, std::min<int64_t>(kernels_.tile_cols, last_ - start), classes_,
                               panel, row_max, scratch);
  }

  const Kernels<T>& kernels_;
  const T* rows_;
  int64_t classes_, first_, last_, count_;
  std::vector<int64_t> slot_;  // of each panel among the packed ones, or -1
  bool kept_;
  double magnitude_ = 0;
  Workspace<T> packed_, row_max_;
};

// The best pair for one image, for as many edits as wanted. The factorised panels are made on first need and shared by
// the images of the batch.
template <class T>
class ImageSearch {
 public:
  ImageSearch(const Problem& p, int64_t image, std::unique_ptr<CandidatePanels<T>>& panels, int64_t first, int64_t last)
      : p_(p),
        kernels_(cpu_kernels_for<T>()),
        panels_(panels),
        union_first_(first),
        union_last_(last),
        begin_(p.range.const_data_ptr<int64_t>()[2 * image]),
        end_(std::max(begin_, p.range.const_data_ptr<int64_t>()[2 * image + 1])),
        target_(p.target.const_data_ptr<int64_t>()[image]),
        cell_logits_(p.cell_logits.const_data_ptr<T>() + image * p.cells * p.classes),
        similarity_(p.similarity.const_data_ptr<T>() + image * p.cells * p.candidates),
        shortlist_(p.shortlist ? p.shortlist->const_data_ptr<int64_t>() + image * p.cells * p.listed : nullptr),
        used_(p.candidates, 0) {}

  void use(int64_t candidate) {
    used_[candidate] = 1;
    if (bias_ready_) column_bias_.data()[candidate - first_column_] = std::numeric_limits<T>::infinity();
  }

  // The best pair of one of `cells` (ascending) and an allowed candidate, given the logits now.
  Choice best(const T* logits, const std::vector<int64_t>& cells) {
    std::vector<Pair> pairs;
    Choice choice;
    if (cells.empty()) return choice;
    if (p_.shortlist) {  // also where it is empty: nothing is allowed then
      list_shortlist(cells, pairs);
    } else if (int64_t(cells.size()) * (end_ - begin_) <= kDirectPairs) {
      for (size_t r = 0; r < cells.size(); ++r)
        for (int64_t n = begin_; n < end_; ++n)
          if (!used_[n]) pairs.push_back(Pair{int32_t(r), 1, n, 0});
    } else {
      choice = scan(logits, cells, pairs);
    }
    parallel_tiles(int64_t(pairs.size()), 128,
                   [&](int64_t begin, int64_t end) { score(logits, cells, pairs.data() + begin, end - begin); });
    choice.take(pairs.data(), int64_t(pairs.size()), cells);
    return choice;
  }

 private:
  void list_shortlist(const std::vector<int64_t>& cells, std::vector<Pair>& pairs) const {
    for (size_t r = 0; r < cells.size(); ++r)
      for (int64_t k = 0; k < p_.listed; ++k) {
        const int64_t n = shortlist_[cells[r] * p_.listed + k];
        if (n >= begin_ && n < end_ && !used_[n]) pairs.push_back(Pair{int32_t(r), 1, n, 0});
      }
  }

  void score(const T* logits, const std::vector<int64_t>& cells, Pair* pairs, int64_t count) const {
    const ExactArgs<T> args{logits,      cell_logits_,  p_.candidate_logits.const_data_ptr<T>(),
                            similarity_, p_.classes,    p_.candidates,
                            target_,     p_.weight_sim, p_.weight_cls};
    Workspace<double> scratch(p_.classes + 16);
    kernels_.exact_losses(args, cells.data(), pairs, count, scratch.data());
  }

  // weight_cls (n_n - K_nt) for every column of this image's panels, +inf where the candidate may not be taken.
  void prepare_columns() {
    if (!panels_) panels_ = std::make_unique<CandidatePanels<T>>(p_, union_first_, union_last_);
    first_panel_ = panels_->panel_of(begin_);
    past_panel_ = panels_->panel_past(end_);
    first_column_ = panels_->first_row(first_panel_);
    const int64_t columns = (past_panel_ - first_panel_) * kernels_.tile_cols;
    const T* rows = p_.candidate_logits.const_data_ptr<T>();
    column_bias_.resize(columns);
    for (int64_t j = 0; j < columns; ++j) {
      const int64_t n = first_column_ + j;
      const bool open = n >= begin_ && n < end_ && !used_[n];
      column_bias_.data()[j] = open ? T(p_.weight_cls) * (panels_->row_max(n) - rows[n * p_.classes + target_])
                                    : std::numeric_limits<T>::infinity();
    }
    bias_ready_ = true;
  }

  // Leaves in `pairs` those that may be the best; returns the best of those that it had to score on the way.
  Choice scan(const T* logits, const std::vector<int64_t>& cells, std::vector<Pair>& pairs) {
    if (!bias_ready_) prepare_columns();
    const int64_t rows = int64_t(cells.size());
    const T wc = T(p_.weight_cls), ws = T(p_.weight_sim);
    factors_.resize(rows * p_.classes);
    row_bias_.resize(rows);
    Workspace<T> scratch(2 * (p_.classes + kernels_.lanes));
    const double difference = kernels_.pack_factors(logits, cell_logits_, cells.data(), rows, p_.classes,
                                                    factors_.data(), row_bias_.data(), scratch.data());
    for (int64_t r = 0; r < rows; ++r) {
      T& bias = row_bias_.data()[r];  // holds m_p
      bias = ws + wc * (bias - (logits[target_] - cell_logits_[cells[r] * p_.classes + target_]));
    }
    // The guard covers the rounding of the product (C terms), of the logits' differences, and of the two weights.
    const double eps = sizeof(T) == 4 ? 0x1p-24 : 0x1p-53;
    const double slack =
        eps * (p_.weight_cls * (2.0 * double(p_.classes) + 8.0 * (difference + panels_->magnitude())) + 8.0 * ws);
    const ScanArgs<T> args{factors_.data(),
                           row_bias_.data(),
                           cells.data(),
                           similarity_,
                           column_bias_.data(),
                           rows,
                           p_.classes,
                           p_.candidates,
                           first_column_,
                           ws,
                           wc,
                           slack,
                           sizeof(T) == 4 ? kRescoreGuardFloat : kRescoreGuardDouble};
    const auto reach = [&](double b) {
      return b + args.guard_slack + args.guard_relative * std::max(1.0, std::abs(b));
    };
    std::mutex guard;
    double best = std::numeric_limits<double>::infinity();
    Choice scored;
    parallel_tiles(past_panel_ - first_panel_, 1, [&](int64_t begin, int64_t end) {
      PairStore found;
      double own = std::numeric_limits<double>::infinity();
      Choice own_scored;
      Workspace<T> panel(panels_->panel_scratch());
      for (int64_t i = begin; i < end; ++i) {
        kernels_.scan_panel(args, panels_->panel(first_panel_ + i, panel.data()), i, &own, &found);
        if (found.size <= kPairsHeld) continue;
        drop_pairs(found, reach(own));
        if (found.size <= kPairsHeld / 2) continue;
        // Whether a pair is scored now or with the others, its loss has the same bits.
        score(logits, cells, found.data, found.size);
        own_scored.take(found.data, found.size, cells);
        found.size = 0;
      }
      const std::lock_guard<std::mutex> lock(guard);
      best = std::min(best, own);
      scored.take(own_scored);
      pairs.insert(pairs.end(), found.data, found.data + found.size);
    });
    const double limit = reach(best);
    pairs.erase(std::remove_if(pairs.begin(), pairs.end(), [&](const Pair& x) { return !x.keep && x.loss > limit; }),
                pairs.end());
    return scored;
  }

  const Problem& p_;
  const Kernels<T>& kernels_;
  std::unique_ptr<CandidatePanels<T>>& panels_;
  const int64_t union_first_, union_last_, begin_, end_, target_;
  const T* cell_logits_;
  const T* similarity_;
  const int64_t* shortlist_;
  std::vector<char> used_;
  bool bias_ready_ = false;
  int64_t first_panel_ = 0, past_panel_ = 0;  // panels that hold any of this image's candidates
  int64_t first_column_ = 0;                  // bank row of the first column of column_bias_
  Workspace<T> column_bias_, factors_, row_bias_;
};

// The rows that any image of the batch may use.
std::pair<int64_t, int64_t> union_range(const Problem& p) {
  const int64_t* range = p.range.const_data_ptr<int64_t>();
  int64_t first = p.candidates, last = 0;
  for (int64_t b = 0; b < p.images; ++b)
    if (range[2 * b] < range[2 * b + 1]) {
      first = std::min(first, range[2 * b]);
      last = std::max(last, range[2 * b + 1]);
    }
  return {std::min(first, last), last};
}

std::tuple<Tensor, Tensor, Tensor> best_replacement(Tensor cell_logits, Tensor candidate_logits, Tensor similarity,
                                                    Tensor logits, Tensor target, Tensor allowed,
                                                    Tensor candidate_range, std::optional<Tensor> shortlist,
                                                    std::optional<Tensor> used, double weight_sim, double weight_cls) {
  const char* op = "best_replacement";
  const Problem p = check_problem(op, cell_logits, candidate_logits, similarity, target, candidate_range, shortlist,
                                  weight_sim, weight_cls);
  check_shape(op, "logits", logits, {p.images, p.classes}, "B, C");
  check_dtype(op, "logits", logits, cell_logits.scalar_type());
  check_shape(op, "allowed", allowed, {p.images, p.cells}, "B, P");
  check_dtype(op, "allowed", allowed, ScalarType::Bool);
  std::optional<Tensor> spent;
  if (used) {
    check_shape(op, "used", *used, {p.images, p.candidates}, "B, N");
    check_dtype(op, "used", *used, ScalarType::Bool);
    spent = to_contiguous(*used);
  }
  const Tensor now = to_contiguous(logits), open = to_contiguous(allowed);
  Tensor cell = empty(cell_logits, {p.images}, ScalarType::Long);
  Tensor candidate = empty(cell_logits, {p.images}, ScalarType::Long);
  Tensor loss = empty(cell_logits, {p.images}, cell_logits.scalar_type());
  const auto [first, last] = union_range(p);
  dispatch_float(op, cell_logits, [&, first = first, last = last](auto scalar) {
    using T = decltype(scalar);
    std::unique_ptr<CandidatePanels<T>> panels;
    for (int64_t b = 0; b < p.images; ++b) {
      ImageSearch<T> search(p, b, panels, first, last);
      for (int64_t n = 0; spent && n < p.candidates; ++n)
        if (spent->const_data_ptr<bool>()[b * p.candidates + n]) search.use(n);
      std::vector<int64_t> cells;
      for (int64_t i = 0; i < p.cells; ++i)
        if (open.const_data_ptr<bool>()[b * p.cells + i]) cells.push_back(i);
      const Choice choice = search.best(now.const_data_ptr<T>() + b * p.classes, cells);
      cell.mutable_data_ptr<int64_t>()[b] = choice.cell;
      candidate.mutable_data_ptr<int64_t>()[b] = choice.candidate;
      loss.mutable_data_ptr<T>()[b] = T(choice.loss);
    }
  });
  return {cell, candidate, loss};
}

// The cells in falling order of score; ties: lowest cell.
template <class T>
std::vector<int64_t> rank_cells(const T* scores, int64_t cells) {
  std::vector<int64_t> order(cells);
  std::iota(order.begin(), order.end(), int64_t(0));
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return scores[a] > scores[b]; });
  return order;
}

template <class T>
bool is_top(const T* logits, int64_t classes, int64_t target) {
  return std::max_element(logits, logits + classes) - logits == target;  // the first of equals
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> replace_until_flip(
    Tensor cell_logits, Tensor candidate_logits, Tensor similarity, Tensor base_logits, Tensor target,
    Tensor cell_scores, Tensor candidate_range, std::optional<Tensor> shortlist, int64_t top_cells, int64_t max_edits,
    bool reuse_candidates, double weight_sim, double weight_cls) {
  const char* op = "replace_until_flip";
  const Problem p = check_problem(op, cell_logits, candidate_logits, similarity, target, candidate_range, shortlist,
                                  weight_sim, weight_cls);
  check_shape(op, "base_logits", base_logits, {p.images, p.classes}, "B, C");
  check_dtype(op, "base_logits", base_logits, cell_logits.scalar_type());
  check_shape(op, "cell_scores", cell_scores, {p.images, p.cells}, "B, P");
  check_dtype(op, "cell_scores", cell_scores, cell_logits.scalar_type());
  check(top_cells >= 1, op, ": top_cells must be at least 1, got ", top_cells);
  check(max_edits >= 0, op, ": max_edits must not be negative, got ", max_edits);
  const ScalarType dtype = cell_logits.scalar_type();
  const Tensor base = to_contiguous(base_logits), scores = to_contiguous(cell_scores);
  Tensor cells = empty(cell_logits, {p.images, max_edits}, ScalarType::Long);
  Tensor candidates = empty(cell_logits, {p.images, max_edits}, ScalarType::Long);
  Tensor losses = empty(cell_logits, {p.images, max_edits}, dtype);
  Tensor path = empty(cell_logits, {p.images, max_edits + 1, p.classes}, dtype);
  Tensor n_edits = empty(cell_logits, {p.images}, ScalarType::Long);
  Tensor flipped = empty(cell_logits, {p.images}, ScalarType::Bool);
  const auto [first, last] = union_range(p);
  dispatch_float(op, cell_logits, [&, first = first, last = last](auto scalar) {
    using T = decltype(scalar);
    std::unique_ptr<CandidatePanels<T>> panels;
    const int64_t classes = p.classes;
    for (int64_t b = 0; b < p.images; ++b) {
      const T* cell_rows = p.cell_logits.const_data_ptr<T>() + b * p.cells * classes;
      const int64_t goal = p.target.const_data_ptr<int64_t>()[b];
      T* row = path.mutable_data_ptr<T>() + b * (max_edits + 1) * classes;
      std::copy_n(base.const_data_ptr<T>() + b * classes, classes, row);
      for (int64_t i = 0; i < p.cells; ++i)
        for (int64_t c = 0; c < classes; ++c) row[c] += cell_rows[i * classes + c];

      ImageSearch<T> search(p, b, panels, first, last);
      std::vector<int64_t> left = rank_cells(scores.const_data_ptr<T>() + b * p.cells, p.cells), active;
      int64_t edits = 0;
      bool at_goal = is_top(row, classes, goal);
      for (; edits < max_edits && !at_goal; ++edits) {
        active.assign(left.begin(), left.begin() + std::min<int64_t>(top_cells, int64_t(left.size())));
        std::sort(active.begin(), active.end());
        const Choice choice = search.best(row, active);
        if (choice.cell < 0) break;
        const int64_t at = b * max_edits + edits;
        cells.mutable_data_ptr<int64_t>()[at] = choice.cell;
        candidates.mutable_data_ptr<int64_t>()[at] = choice.candidate;
        losses.mutable_data_ptr<T>()[at] = T(choice.loss);
        const T* from = cell_rows + choice.cell * classes;
        const T* to = p.candidate_logits.const_data_ptr<T>() + choice.candidate * classes;
        for (int64_t c = 0; c < classes; ++c) row[classes + c] = row[c] - from[c] + to[c];
        row += classes;
        left.erase(std::find(left.begin(), left.end(), choice.cell));
        if (!reuse_candidates) search.use(choice.candidate);
        at_goal = is_top(row, classes, goal);
      }
      for (int64_t i = edits; i < max_edits; ++i) {
        const int64_t at = b * max_edits + i;
        cells.mutable_data_ptr<int64_t>()[at] = -1;
        candidates.mutable_data_ptr<int64_t>()[at] = -1;
        losses.mutable_data_ptr<T>()[at] = std::numeric_limits<T>::infinity();
        std::copy_n(row, classes, row + (i - edits + 1) * classes);
      }
      n_edits.mutable_data_ptr<int64_t>()[b] = edits;
      flipped.mutable_data_ptr<bool>()[b] = at_goal;
    }
  });
  return {cells, candidates, losses, path, n_edits, flipped};
}

}  // namespace
}  // namespace finecf

// For tests: the bytes above which packed candidates are not kept; returns the bytes before.
extern "C" __attribute__((visibility("default"))) int64_t finecf_set_packed_limit(int64_t bytes) {
  return finecf::packed_limit.exchange(bytes);
}

STABLE_TORCH_LIBRARY_IMPL(finecf, CPU, m) {
  m.impl("nearest_candidates", TORCH_BOX(&finecf::nearest_candidates));
  m.impl("best_replacement", TORCH_BOX(&finecf::best_replacement));
  m.impl("replace_until_flip", TORCH_BOX(&finecf::replace_until_flip));
}
