// Draws tokens: the largest of logit / temperature + Gumbel noise over the tokens that are kept, the noise a hash of
// seed, position and token. src/gossamer/engine/draw.py defines it and is the oracle; this is the same, quicker.
#pragma once

#include <cstdint>
#include <vector>

namespace gossamer {

struct DrawParams {
  double temperature;  // 0: the likeliest
  int64_t top_k;       // 0: all
  double top_p, min_p;
  uint64_t seed;
  int64_t position;
};

// One thread's memory for it, kept from row to row.
class Drawer {
 public:
  // The token drawn from logits [vocab_size > 0], or -1 if they are not finite.
  int64_t draw(const float* logits, int64_t vocab_size, const DrawParams&);

 private:
  bool find_best();
  void truncate();
  void gather(const float* values, float least, const float* block_maxima);
  void gather_top_k(float least);
  double weigh_all();
  double weigh_kept();
  template <class Measure>
  void keep_likeliest(double target, const Measure&);
  template <class Measure>
  int64_t crossing(double target, const Measure&);
  int bin_of(int32_t token) const;
  bool likelier(int32_t a, int32_t b) const;
  int64_t contest() const;

  const float* logits_;
  int64_t size_;
  DrawParams params_;
  float best_;  // the largest logit, its token, and log2(e) / temperature
  int64_t best_token_;
  float slope_;
  std::vector<float> maxima_, sorted_;  // the largest logit of each block
  std::vector<float> weights_;          // of each token, where it is needed: exp((logit - best) / temperature)
  std::vector<int32_t> kept_, undecided_;
  int64_t count_;  // of tokens in kept_
};

}  // namespace gossamer
