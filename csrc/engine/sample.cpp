#include "sample.hpp"

#include <algorithm>
#include <bit>
#include <cmath>
#include <functional>
#include <limits>

namespace gossamer {
namespace {

constexpr int64_t Block = 64;  // tokens that are looked at together
constexpr int Lanes = 16;      // written out: compilers do not reorder floats on their own
constexpr int BinShift = 18, Bins = (127 << (23 - BinShift)) + 1;  // of weights from 1 to 2^-126
constexpr double Log2E = 1.4426950408889634;
constexpr float SteepestSlope = 1e30f;

constexpr uint64_t Step = 0x9E3779B97F4A7C15;

inline uint64_t mixed(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EB;
  return x ^ (x >> 31);
}

// 2^z for z up to 0, to 1e-7 of it; nothing is below 2^-126.
inline float weight_of(float exponent) {
  const float z = exponent > -126.0f ? exponent : -126.0f;
  constexpr float round = 12582912.0f;  // 1.5 * 2^23: what is added to it becomes an integer
  const float whole = z + round, f = z - (whole - round);
  const float p =
      1.0f + f * (0.693147182f + f * (0.240226462f + f * (0.0555032776f + f * (0.00961851444f +
      f * (0.00134005f + f * 0.000154353f)))));
  return std::bit_cast<float>(std::bit_cast<int32_t>(p) + ((std::bit_cast<int32_t>(whole) - 0x4B400000) << 23));
}

// The race of all tokens for the largest score. Few can win: that the others cannot shows from some bits of their hash.
class Contest {
 public:
  Contest(const DrawParams& p, float best, float slope)
      : start_(mixed(mixed(p.seed + Step) ^ uint64_t(p.position))), temperature_(p.temperature), best_(best),
        slope_(slope) {}

  void enter(float logit, int64_t token) {
    const double uniform = (double(hash(token) >> 12) + 0.5) * 0x1p-52;
    const double score = (double(logit) - best_) / temperature_ - std::log(-std::log1p(-uniform));
    if (score <= score_) return;
    score_ = score;
    token_ = token;
    bound_ = float(score * Log2E) - 1e-3f;
  }

  // Up to Block tokens; the likeliest of all must have entered before.
  template <class TokenAt>
  void enter_block(const float* logits, int64_t count, const TokenAt& token_at) {
    int32_t top[Block];
    float most[Block];
    for (int64_t j = 0; j < count; ++j) top[j] = int32_t(hash(token_at(j)) >> 33);
    int any = 0;
    for (int64_t j = 0; j < count; ++j) {
      // An exponential variable -log(1 - u) is above u, and log2(u) above what a float's bits, read as an integer, say.
      const float log_uniform = float(std::bit_cast<int32_t>(float(top[j]))) * 0x1p-23f - (127 + 31);
      most[j] = (logits[j] - best_) * slope_ - log_uniform;
      any |= most[j] > bound_;
    }
    if (!any) return;
    for (int64_t j = 0; j < count; ++j) {
      if (most[j] > bound_) enter(logits[j], token_at(j));
    }
  }

  // False if no token with such a logit can win, whatever its noise.
  bool open_to(float logit) const { return (logit - best_) * slope_ + 54.0f > bound_; }
  int64_t winner() const { return token_; }

 private:
  uint64_t hash(int64_t token) const { return mixed(start_ + uint64_t(token + 1) * Step); }

  const uint64_t start_;
  const double temperature_;
  const float best_, slope_;
  double score_ = -std::numeric_limits<double>::infinity();
  float bound_ = -std::numeric_limits<float>::infinity();  // of the best score so far, in bits, a little below it
  int64_t token_ = -1;
};

}  // namespace

int64_t Drawer::draw(const float* logits, int64_t vocab_size, const DrawParams& params) {
  logits_ = logits;
  size_ = vocab_size;
  params_ = params;
  if (!find_best()) return -1;
  if (params.temperature == 0 || params.top_k == 1) return best_token_;
  slope_ = float(std::min(Log2E / params.temperature, double(SteepestSlope)));
  if (params.top_k >= vocab_size) params_.top_k = 0;
  if (params_.top_k > 0 || params.top_p < 1 || params.min_p > 0) {
    truncate();
    return contest();
  }
  Contest all(params, best_, slope_);
  all.enter(best_, best_token_);
  for (int64_t at = 0; at < size_; at += Block) {
    if (!all.open_to(maxima_[at / Block])) continue;
    all.enter_block(logits_ + at, std::min(Block, size_ - at), [&](int64_t j) { return at + j; });
  }
  return all.winner();
}

// The largest logit of each block and of all; false if that is not finite.
bool Drawer::find_best() {
  const int64_t blocks = (size_ + Block - 1) / Block;
  maxima_.resize(blocks);
  int strange = 0;  // NaN is not equal to itself
  for (int64_t b = 0; b < blocks; ++b) {
    const float* x = logits_ + b * Block;
    const int64_t count = std::min(Block, size_ - b * Block), whole = count / Lanes * Lanes;
    float most[Lanes];
    std::fill_n(most, Lanes, -std::numeric_limits<float>::infinity());
    for (int64_t i = 0; i < whole; i += Lanes) {
      for (int j = 0; j < Lanes; ++j) {
        most[j] = x[i + j] > most[j] ? x[i + j] : most[j];
        strange |= x[i + j] != x[i + j];
      }
    }
    for (int64_t i = whole; i < count; ++i) {
      most[0] = x[i] > most[0] ? x[i] : most[0];
      strange |= x[i] != x[i];
    }
    for (int half = Lanes / 2; half > 0; half /= 2) {
      for (int j = 0; j < half; ++j) most[j] = most[j + half] > most[j] ? most[j + half] : most[j];
    }
    maxima_[b] = most[0];
  }
  const auto block = std::max_element(maxima_.begin(), maxima_.end());
  best_ = *block;
  if (strange || !std::isfinite(best_)) return false;
  best_token_ = std::find(logits_ + (block - maxima_.begin()) * Block, logits_ + size_, best_) - logits_;
  return true;
}

// Leaves in kept_ what top_k, then top_p, then min_p keep.
void Drawer::truncate() {
  constexpr float lowest = std::numeric_limits<float>::lowest();
  const double allowed = params_.min_p > 0 ? best_ + params_.temperature * std::log(params_.min_p) : double(lowest);
  const float least = params_.top_p < 1 ? lowest : float(std::max(allowed, double(lowest)));
  if (params_.top_k > 0) {
    gather_top_k(least);
  } else if (params_.top_p == 1) {
    gather(logits_, least, maxima_.data());
  } else {
    // All tokens below this weight are together less than what top_p may drop.
    const double total = weigh_all();
    gather(weights_.data(), float((1 - params_.top_p) * total / double(size_) * 0.999), nullptr);
    keep_likeliest(params_.top_p * total, [&](int32_t token) { return weights_[token]; });
  }
  if (params_.top_k > 0 && params_.top_p < 1) {
    keep_likeliest(params_.top_p * weigh_kept(), [&](int32_t token) { return weights_[token]; });
  }
  const auto begin = kept_.begin();
  count_ = std::remove_if(begin, begin + count_, [&](int32_t token) { return logits_[token] < allowed; }) - begin;
}

// Puts the tokens in kept_ whose value is not below `least`.
void Drawer::gather(const float* values, float least, const float* block_maxima) {
  kept_.resize(size_ + 1);
  count_ = 0;
  for (int64_t at = 0; at < size_; at += Block) {
    if (block_maxima && block_maxima[at / Block] < least) continue;
    const int64_t end = std::min(at + Block, size_);
    for (int64_t i = at; i < end; ++i) {
      kept_[count_] = int32_t(i);  // without a branch: it stays if the count goes up
      count_ += values[i] >= least;
    }
  }
}

// The top_k likeliest, without some that are below `least`.
void Drawer::gather_top_k(float least) {
  const int64_t k = params_.top_k;
  weights_.resize(size_);
  if (k <= int64_t(maxima_.size())) {  // k tokens reach the k-th largest of the maxima, and few others do
    sorted_ = maxima_;
    std::nth_element(sorted_.begin(), sorted_.begin() + (k - 1), sorted_.end(), std::greater<float>());
    gather(logits_, std::max(least, sorted_[k - 1]), maxima_.data());
    weigh_kept();
  } else {
    weigh_all();
    gather(logits_, least, maxima_.data());
  }
  if (count_ > k) keep_likeliest(double(k), [](int32_t) { return 1.0; });
}

bool Drawer::likelier(int32_t a, int32_t b) const { return logits_[a] != logits_[b] ? logits_[a] > logits_[b] : a < b; }

// Fills weights_ and returns their sum.
double Drawer::weigh_all() {
  weights_.resize(size_);
  double sum = 0;
  for (int64_t at = 0; at < size_; at += Block) {
    const int64_t count = std::min(Block, size_ - at), whole = count / Lanes * Lanes;
    const float* x = logits_ + at;
    float *w = weights_.data() + at, sums[Lanes] = {};
    for (int64_t i = 0; i < count; ++i) w[i] = weight_of((x[i] - best_) * slope_);
    for (int64_t i = 0; i < whole; i += Lanes) {
      for (int j = 0; j < Lanes; ++j) sums[j] += w[i + j];
    }
    for (int64_t i = whole; i < count; ++i) sums[0] += w[i];
    for (const float s : sums) sum += s;
  }
  return sum;
}

double Drawer::weigh_kept() {
  double sum = 0;
  for (int64_t i = 0; i < count_; ++i) {
    sum += weights_[kept_[i]] = weight_of((logits_[kept_[i]] - best_) * slope_);
  }
  return sum;
}

// By weight, the largest first: so many bins to a power of two as 2^(23 - BinShift).
int Drawer::bin_of(int32_t token) const {
  return std::max(0, std::bit_cast<int32_t>(1.0f) - std::bit_cast<int32_t>(weights_[token])) >> BinShift;
}

// Keeps the likeliest of the tokens, as many as are needed for measures whose sum reaches the target.
template <class Measure>
void Drawer::keep_likeliest(double target, const Measure& measure) {
  double bins[Bins] = {}, before = 0;
  for (int64_t i = 0; i < count_; ++i) bins[bin_of(kept_[i])] += measure(kept_[i]);
  int last = 0;  // the bin in which it is reached
  while (last < Bins - 1 && before + bins[last] < target) before += bins[last++];
  undecided_.clear();
  int64_t kept = 0;
  for (int64_t i = 0; i < count_; ++i) {
    const int32_t token = kept_[i];
    const int bin = bin_of(token);
    if (bin == last) undecided_.push_back(token);
    kept_[kept] = token;
    kept += bin < last;
  }
  const int64_t more = crossing(target - before, measure);
  std::copy_n(undecided_.begin(), more, kept_.begin() + kept);
  count_ = kept + more;
}

// Puts the likeliest of undecided_ first, as many as are needed for a sum that reaches the target; returns how many.
template <class Measure>
int64_t Drawer::crossing(double target, const Measure& measure) {
  const auto order = [this](int32_t a, int32_t b) { return likelier(a, b); };
  const auto first = undecided_.begin();
  int64_t begin = 0, end = int64_t(undecided_.size());
  double sum = 0;
  while (end - begin > 32) {
    const int64_t middle = (begin + end) / 2;
    std::nth_element(first + begin, first + middle, first + end, order);
    double half = 0;
    for (int64_t i = begin; i < middle; ++i) half += measure(first[i]);
    if (sum + half >= target) {
      end = middle;
    } else {
      sum += half;
      begin = middle;
    }
  }
  std::sort(first + begin, first + end, order);
  while (begin < end && sum < target) sum += measure(first[begin++]);
  return begin;
}

int64_t Drawer::contest() const {
  Contest kept(params_, best_, slope_);
  kept.enter(best_, best_token_);
  float logits[Block];
  for (int64_t at = 0; at < count_; at += Block) {
    const int32_t* tokens = kept_.data() + at;
    const int64_t count = std::min(Block, count_ - at);
    for (int64_t j = 0; j < count; ++j) logits[j] = logits_[tokens[j]];
    kept.enter_block(logits, count, [&](int64_t j) { return int64_t(tokens[j]); });
  }
  return kept.winner();
}

}  // namespace gossamer
