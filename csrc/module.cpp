// The Python face of the kernels: arrays in, arrays written in place, the GIL released while they are computed.
// src/gossamer/kernels/cpu.py words errors for users; the checks here only make sure that no call from Python,
// however wrong, reads or writes outside its arrays (ValueError, or TypeError from nanobind).
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <optional>
#include <string>
#include <vector>

#include "codes.hpp"
#include "engine/bind.hpp"
#include "isa.hpp"
#include "linear.hpp"

namespace nb = nanobind;
using namespace gossamer;

namespace {

template <class T>
using Matrix = nb::ndarray<T, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

void require(bool holds, const char* what) {
  if (!holds) throw nb::value_error(what);
}

void check_codes(int64_t packed_rows, int64_t words, int64_t rows, int64_t columns, int bits) {
  require(1 <= bits && bits <= 8, "bits must be from 1 to 8");
  require(packed_rows == rows && words == words_for(columns, bits), "packed and codes differ in shape");
}

void unpack_codes_into(Matrix<const int32_t> packed, Matrix<int8_t> codes, int bits) {
  const int64_t rows = codes.shape(0), columns = codes.shape(1);
  check_codes(packed.shape(0), packed.shape(1), rows, columns, bits);
  nb::gil_scoped_release release;
  unpack_codes(reinterpret_cast<const uint32_t*>(packed.data()), codes.data(), rows, columns, bits);
}

void pack_codes_into(Matrix<const int8_t> codes, Matrix<int32_t> packed, int bits) {
  const int64_t rows = codes.shape(0), columns = codes.shape(1);
  check_codes(packed.shape(0), packed.shape(1), rows, columns, bits);
  nb::gil_scoped_release release;
  pack_codes(codes.data(), reinterpret_cast<uint32_t*>(packed.data()), rows, columns, bits);
}

// What packed_linear and dequantize take; shapes agree and nothing is empty.
Packed packed_weight(const Matrix<const int32_t>& packed, const Matrix<const float>& scale,
                     const std::optional<Matrix<const int8_t>>& zero, int bits, int64_t columns) {
  const int64_t rows = packed.shape(0), groups = scale.shape(1);
  require(2 <= bits && bits <= 8, "bits must be from 2 to 8");
  require(rows > 0 && columns > 0 && groups > 0, "the weight is empty");
  require(int64_t(packed.shape(1)) == words_for(columns, bits), "packed does not hold so many columns");
  require(int64_t(scale.shape(0)) == rows && columns % groups == 0, "scale does not fit the weight");
  require(!zero || (int64_t(zero->shape(0)) == rows && int64_t(zero->shape(1)) == groups), "zero does not fit scale");
  return {reinterpret_cast<const uint32_t*>(packed.data()), scale.data(), zero ? zero->data() : nullptr, rows, columns,
          groups, bits};
}

void require_threads(int threads) { require(1 <= threads && threads <= 1024, "threads must be from 1 to 1024"); }

void packed_linear_into(Matrix<const float> x, Matrix<const int32_t> packed, Matrix<const float> scale,
                        std::optional<Matrix<const int8_t>> zero, int bits, int threads, Matrix<float> y) {
  const Packed weight = packed_weight(packed, scale, zero, bits, x.shape(1));
  require_threads(threads);
  require(y.shape(0) == x.shape(0) && int64_t(y.shape(1)) == weight.rows, "y does not fit x and the weight");
  nb::gil_scoped_release release;
  packed_linear(x.data(), x.shape(0), weight, threads, y.data());
}

void dequantize_into(Matrix<const int32_t> packed, Matrix<const float> scale, std::optional<Matrix<const int8_t>> zero,
                     int bits, int threads, Matrix<float> out) {
  const Packed weight = packed_weight(packed, scale, zero, bits, out.shape(1));
  require_threads(threads);
  require(int64_t(out.shape(0)) == weight.rows, "out does not fit the weight");
  nb::gil_scoped_release release;
  dequantize(weight, threads, out.data());
}

void dense_linear_bf16_into(Matrix<const float> x, Matrix<const uint16_t> weight, int threads, Matrix<float> y) {
  const int64_t tokens = x.shape(0), rows = weight.shape(0), columns = weight.shape(1);
  require_threads(threads);
  require(rows > 0 && columns > 0, "the weight is empty");
  require(int64_t(x.shape(1)) == columns, "x does not fit the weight");
  require(int64_t(y.shape(0)) == tokens && int64_t(y.shape(1)) == rows, "y does not fit x and the weight");
  nb::gil_scoped_release release;
  bf16_linear(x.data(), tokens, weight.data(), rows, columns, threads, y.data());
}

uint64_t read_all(nb::ndarray<const uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu> data, int threads) {
  require_threads(threads);
  nb::gil_scoped_release release;
  return read_bytes(data.data(), data.shape(0), threads);
}

std::vector<std::string> isas() {
  std::vector<std::string> names;
  for (const Kernels* table : available_kernels()) names.emplace_back(table->name);
  return names;
}

}  // namespace

NB_MODULE(_cpu, m) {
  nb::set_leak_warnings(false);  // what lives to the end of the process is not worth a word
  m.doc() = "C++ kernels of Gossamer; called through gossamer.kernels.cpu";
  // noconvert: an array of another type or layout is refused, never copied in silence.
  const auto packed = nb::arg("packed").noconvert(), codes = nb::arg("codes").noconvert();
  const auto x = nb::arg("x").noconvert(), y = nb::arg("y").noconvert();
  const auto scale = nb::arg("scale").noconvert(), weight = nb::arg("weight").noconvert();
  const auto zero = nb::arg("zero").noconvert().none();
  const auto bits = nb::arg("bits"), threads = nb::arg("threads");
  m.def("unpack_codes", unpack_codes_into, packed, codes, bits);
  m.def("pack_codes", pack_codes_into, codes, packed, bits);
  m.def("packed_linear", packed_linear_into, x, packed, scale, zero, bits, threads, y);
  m.def("dequantize", dequantize_into, packed, scale, zero, bits, threads, nb::arg("out").noconvert());
  m.def("dense_linear_bf16", dense_linear_bf16_into, x, weight, threads, y);
  m.def("read_bytes", read_all, nb::arg("data").noconvert(), threads);
  m.def("isas", isas);
  m.def("isa", [] { return kernels().name; });
  m.def("use_isa", [](const std::string& name) { require(use_kernels(name), "this machine does not have that"); },
        nb::arg("name"));
  bind_engine(m);
}
