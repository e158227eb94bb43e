// The Python module swalp._kernels: the C interface, on addresses. `swalp/_kernels.pyi` describes it.
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <string.h>

#include <algorithm>
#include <new>
#include <optional>
#include <tuple>
#include <vector>

#include "convolution.h"
#include "heads.h"
#include "kernels.h"
#include "linear.h"
#include "packing.h"
#include "plain.h"
#include "products.h"

namespace {

swalp_layout layout(const std::vector<int64_t>& sizes, const std::vector<int64_t>& extents,
                    int64_t positions, int64_t channels) {
  if (sizes.size() != extents.size() || sizes.empty() || sizes.size() > SWALP_MAX_DIMS)
    throw nb::value_error("Layout: 1 to 8 sizes, and an extent for each");
  swalp_layout l = {};
  l.dims = static_cast<int32_t>(sizes.size());
  for (size_t axis = 0; axis < sizes.size(); ++axis) {
    l.size[axis] = sizes[axis];
    l.extent[axis] = extents[axis];
  }
  l.positions = positions;
  l.channels = channels;
  return l;
}

// One block of `elements`, or none, whose rows lie apart: of so many sizes and strides.
swalp_layout rows_apart(int64_t elements, const std::vector<int64_t>& sizes,
                        const std::vector<int64_t>& strides) {
  if (sizes.size() != strides.size() || sizes.empty() || sizes.size() > SWALP_MAX_DIMS)
    throw nb::value_error("rows_apart: 1 to 8 sizes, and a stride for each");
  swalp_layout l = flat(elements);
  l.apart = static_cast<int32_t>(sizes.size());
  std::copy(sizes.begin(), sizes.end(), l.apart_size);
  std::copy(strides.begin(), strides.end(), l.apart_stride);
  return l;
}

// Returns whether a NaN was lost, and the exponent. Sizes in the order of the struct's fields.
std::tuple<bool, int32_t> quantize_part(
    const swalp_format& f, std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t, int64_t> sizes,
    uintptr_t x, uintptr_t out, int32_t guess, int32_t rule, int32_t bits, uint64_t seed, uint32_t step,
    uint32_t call, int threads) {
  const swalp_rounding r = {rule, bits, seed, step, call};
  swalp_part part;
  std::tie(part.start, part.planes, part.rows, part.columns, part.plane_stride, part.row_stride) = sizes;
  nb::gil_scoped_release unlocked;
  const int lost = swalp_quantize_part(&f, &r, &part, at<float>(x), at<int8_t>(out), &guess, threads);
  return {lost != 0, guess};
}

// `quantize` of a plain tensor into another, or into a new one if `out` is None. None, and nothing done:
// one is not plain, or its shape not among `rows`, of shapes their layouts (None: each is one row), or
// `rule` is none. `seed`: None for a fresh one.
nb::object quantize_plain(const Torch& torch, const swalp_format& f, nb::handle rows, nb::handle x,
                          nb::handle out, int32_t rule, int32_t bits, nb::object seed, uint32_t step,
                          uint32_t call) {
  if (rule < 0 || !torch.unwatched()) return nb::none();
  const Memory from = torch.plain(x);
  if (!from.data) return nb::none();
  const nb::object known = rows.is_none() ? nb::object() : torch.at_shape(rows, x);
  if (!rows.is_none() && !known.is_valid()) return nb::none();
  const nb::object result = out.is_none() ? torch.empty_like(x) : nb::borrow(out);
  Memory to = from;
  if (out.is_none()) {
    to = torch.memory(result);
    if (to.count != from.count) return nb::none();  // a mode of PyTorch's gave something else
  } else if (!out.is(x)) {
    to = torch.plain(out);
    const int64_t distance = to.data > from.data ? to.data - from.data : from.data - to.data;
    if (!to.data || (distance && distance < from.count) || !torch.of_one_shape(x, out)) return nb::none();
  }
  if (!out.is_none()) torch.note_written(out);
  if (seed.is_none()) seed = torch.fresh_seed();
  quantize(f, known.is_valid() ? nb::cast<const swalp_layout&>(known) : flat(from.count),
           reinterpret_cast<uintptr_t>(from.data), reinterpret_cast<uintptr_t>(to.data), SWALP_FLOAT32, 0, 4,
           rule, bits, nb::cast<uint64_t>(seed), step, call,
           from.count < kHoldLock ? 1 : torch.threads());
  return result;
}

void quantize_many(const swalp_format& f, const std::vector<const swalp_layout*>& layouts,
                   const std::vector<uintptr_t>& x, const std::vector<uintptr_t>& out, int32_t rule,
                   int32_t bits, const std::vector<std::tuple<uint64_t, uint32_t, uint32_t>>& noise,
                   int threads) {
  const size_t count = layouts.size();
  if (x.size() != count || out.size() != count || (noise.size() != 1 && noise.size() != count))
    throw nb::value_error("quantize_many: lists of different lengths");
  std::vector<swalp_rounding> r(count);
  for (size_t i = 0; i < count; ++i) {
    const auto& [seed, step, call] = noise[noise.size() == 1 ? 0 : i];
    r[i] = {rule, bits, seed, step, call};
  }
  nb::gil_scoped_release unlocked;
  if (swalp_quantize_many(&f, static_cast<int64_t>(count), r.data(), layouts.data(),
                          reinterpret_cast<const float* const*>(x.data()),
                          reinterpret_cast<float* const*>(out.data()), threads) < 0)
    throw std::bad_alloc();
}

void unpack(const swalp_format& f, const swalp_layout& l, uintptr_t codes, int32_t code_type,
            uintptr_t exponents, int exponent_bytes, uintptr_t table, uintptr_t out, int threads) {
  nb::gil_scoped_release unlocked;
  Exponents shared(exponents, exponent_bytes, l);
  shared.widen();
  swalp_unpack(&f, &l, at<void>(codes), code_type, shared.get(), at<float>(table), at<float>(out),
               threads);
}

void split(uintptr_t halves, int64_t count, bool is_signed, uintptr_t codes, int threads) {
  nb::gil_scoped_release unlocked;
  swalp_split(reinterpret_cast<const void*>(halves), count, is_signed,
              reinterpret_cast<void*>(codes), threads);
}

void join(uintptr_t codes, int64_t count, uintptr_t halves, int threads) {
  nb::gil_scoped_release unlocked;
  swalp_join(reinterpret_cast<const void*>(codes), count, reinterpret_cast<void*>(halves), threads);
}

// `fmt` and `codes_layout` are None for an iterate of floats, of which there are `count`.
void average(int32_t kind, double weight, uintptr_t into, uintptr_t residual, uintptr_t x,
             int32_t type, int64_t count, const swalp_format* fmt, const swalp_layout* codes_layout,
             uintptr_t exponents, uintptr_t table, int threads) {
  const swalp_average_arguments a = {kind,
                                     type,
                                     weight,
                                     reinterpret_cast<void*>(into),
                                     reinterpret_cast<float*>(residual),
                                     reinterpret_cast<const void*>(x),
                                     reinterpret_cast<const int32_t*>(exponents),
                                     reinterpret_cast<const float*>(table)};
  const swalp_layout all = flat(count);
  nb::gil_scoped_release unlocked;
  swalp_average(&a, fmt, codes_layout ? codes_layout : &all, threads);
}

void noise(uintptr_t out, int64_t start, int64_t count, int32_t bits, uint64_t seed, uint32_t step,
           uint32_t call) {
  const swalp_rounding r = {SWALP_STOCHASTIC, bits, seed, step, call};
  swalp_noise(&r, start, count, reinterpret_cast<uint32_t*>(out));
}

void set(swalp_role& role, const swalp_format& f, int32_t rule, int32_t bits, uint64_t seed,
         bool halved, uintptr_t table = 0) {
  role.format = f;
  role.halved = halved;
  role.table = at<float>(table);
  role.rounding = {rule, bits, seed, 0, 0};
}

// `x_format` is None for an iterate of float32. Seed, step and call follow rule and random bits.
void average_rounded(float weight, std::tuple<int64_t, int64_t> blocks, uintptr_t x,
                     uintptr_t x_exponents, const swalp_format* x_format, bool x_halved,
                     uintptr_t into, uintptr_t exponents, const swalp_format& f, bool halved,
                     const std::tuple<int32_t, int32_t, uint64_t, uint32_t, uint32_t>& rounding,
                     int threads) {
  swalp_rounded_average a = {};
  std::tie(a.blocks, a.length) = blocks;
  a.x = at<void>(x);
  a.x_exponents = at<int8_t>(x_exponents);
  a.x_format = x_format;
  a.x_halved = x_halved;
  a.average = at<void>(into);
  a.exponents = at<int8_t>(exponents);
  const auto& [rule, bits, seed, step, call] = rounding;
  set(a.role, f, rule, bits, seed, halved);
  a.role.rounding.step = step;
  a.role.rounding.call = call;
  nb::gil_scoped_release unlocked;
  if (swalp_average_rounded(weight, &a, threads) < 0) throw std::bad_alloc();
}

// A parameter of that shape in blocks, each of them its neighbours in memory.
template <class Parameter> struct Shaped : Parameter {
  std::vector<int64_t> shape;

  Shaped(std::vector<int64_t> sizes, int64_t blocks, int64_t length) : Parameter{}, shape(std::move(sizes)) {
    this->blocks = blocks;
    this->length = length;
  }
};
using SgdParameter = Shaped<swalp_sgd_parameter>;
using AdamParameter = Shaped<swalp_adam_parameter>;

// Where what is kept lies, each followed by its exponents, as far as there is any.
using Places = std::vector<uintptr_t>;

template <class T> T* place_of(const Places& places, size_t i) {
  return at<T>(i < places.size() ? places[i] : 0);
}

void place_sgd(SgdParameter& p, const Places& places) {
  p.weight = place_of<void>(places, 0);
  p.weight_exponents = place_of<int8_t>(places, 1);
  p.momentum = place_of<void>(places, 2);
  p.momentum_exponents = place_of<int8_t>(places, 3);
}

void place_adam(AdamParameter& p, const Places& places) {
  p.weight = place_of<void>(places, 0);
  p.weight_exponents = place_of<int8_t>(places, 1);
  p.moment = place_of<void>(places, 2);
  p.moment_exponents = place_of<int8_t>(places, 3);
  p.root = place_of<void>(places, 4);  // no exponents
}

// The next step is of this gradient; false: it is not plain, or of another shape, or the step is no number for
// noise.
template <class Parameter>
bool bind(Parameter& p, const Torch& torch, nb::handle steps, nb::handle gradient) {
  const Memory memory = torch.in_order(gradient, p.shape);
  uint32_t step;
  if (!memory.data || !nb::try_cast(steps, step)) return false;
  p.gradient = memory.data;
  p.reused = Regions::any_holds(p.gradient);
  p.gradient_role.rounding.step = p.weight_role.rounding.step = step;
  if constexpr (std::is_same_v<Parameter, SgdParameter>) p.momentum_role.rounding.step = step;
  else p.moment_role.rounding.step = p.root_role.rounding.step = step;
  return true;
}

// The same of many parameters that lay like that when they took a step, each with what its state, a dict, has at
// `keys`; false: of one of them something is another.
template <class Parameter>
bool bind_again(const Torch& torch, const std::vector<Parameter*>& kernels, const std::vector<const Layouts*>& layouts,
                nb::list parameters, nb::list gradients, nb::list states, nb::tuple keys) {
  const nb::str step("step");
  std::vector<nb::object> kept;
  for (size_t i = 0; i < kernels.size(); ++i) {
    const nb::handle state = states[i];
    if (!PyDict_CheckExact(state.ptr())) return false;
    kept.assign(1, nb::borrow(parameters[i]));
    for (nb::handle key : keys) kept.push_back(Torch::at_key(state, key));
    kept.push_back(Torch::at_key(state, step));
    if (!std::all_of(kept.begin(), kept.end(), [](const nb::object& each) { return each.is_valid(); })) return false;
    const nb::object steps = std::move(kept.back());
    kept.pop_back();
    if (!layouts[i]->hold(torch, kept) || !bind(*kernels[i], torch, steps, gradients[i])) return false;
  }
  return true;
}

// One step of all parameters, without the interpreter's lock. Returns whether a NaN was lost, and whether
// all weights were finite.
template <class Hyper, class Parameter>
std::tuple<bool, bool> optimize(int (*step)(const Hyper*, const Parameter*, int64_t, int),
                                const Hyper& hyper, const std::vector<Shaped<Parameter>*>& parameters,
                                int threads) {
  std::vector<Parameter> all;
  for (const Parameter* p : parameters) all.push_back(*p);
  nb::gil_scoped_release unlocked;
  const int flags = step(&hyper, all.data(), static_cast<int64_t>(all.size()), threads);
  if (flags < 0) throw std::bad_alloc();
  return {flags & SWALP_LOST, !(flags & SWALP_STRANGE)};
}

// Calls `run` with a trajectory, without the interpreter's lock, so that Python threads run many.
template <class Run>
void descend(int64_t size, uintptr_t weight, uintptr_t sum, uintptr_t squares,
             const std::optional<swalp_format>& format, int32_t rule, int32_t bits, uint64_t seed,
             const std::tuple<int64_t, int64_t, int64_t>& when, const Run& run) {
  swalp_role role = {};
  if (format) set(role, *format, rule, bits, seed, false);
  const auto& [step, start, every] = when;
  const swalp_descent descent = {size, at<float>(weight), at<double>(sum), at<double>(squares),
                                 format ? &role : nullptr, step, start, every};
  nb::gil_scoped_release unlocked;
  if (run(&descent) < 0) throw std::bad_alloc();
}

// Sizes in the order of the struct's fields.
swalp_convolution convolution(const std::vector<int64_t>& sizes) {
  if (sizes.size() != sizeof(swalp_convolution) / sizeof(int64_t))
    throw nb::value_error("Convolution: 16 sizes");
  swalp_convolution c;
  memcpy(&c, sizes.data(), sizeof c);
  return c;
}

int64_t convolution_bytes(const swalp_convolution& c, bool backward) {
  return swalp_convolution_packed_bytes(&c, backward);
}

void convolution_pack(const swalp_convolution& c, bool backward, bool channels_last,
                      uintptr_t weight, uintptr_t packed, int threads) {
  nb::gil_scoped_release unlocked;
  swalp_convolution_pack(&c, backward, channels_last, at<int8_t>(weight), at<void>(packed), threads);
}

void convolution_forward(const swalp_convolution& c, uintptr_t x, uintptr_t packed,
                         int64_t exponent, uintptr_t bias, uintptr_t y, int threads) {
  nb::gil_scoped_release unlocked;
  if (swalp_convolution_forward(&c, at<int8_t>(x), at<void>(packed), exponent, at<float>(bias),
                                at<float>(y), threads) < 0)
    throw std::bad_alloc();
}

void convolution_input_gradient(const swalp_convolution& c, uintptr_t dy, uintptr_t packed,
                                int64_t exponent, uintptr_t dx, int threads) {
  nb::gil_scoped_release unlocked;
  if (swalp_convolution_input_gradient(&c, at<int8_t>(dy), at<void>(packed), exponent,
                                       at<float>(dx), threads) < 0)
    throw std::bad_alloc();
}

void convolution_weight_gradient(const swalp_convolution& c, uintptr_t x, uintptr_t dy,
                                 int64_t exponent, bool channels_last, uintptr_t dw, int threads) {
  nb::gil_scoped_release unlocked;
  if (swalp_convolution_weight_gradient(&c, at<int8_t>(x), at<int8_t>(dy), exponent, channels_last,
                                        at<float>(dw), threads) < 0)
    throw std::bad_alloc();
}

}  // namespace

NB_MODULE(_kernels, m) {
  nb::set_leak_warnings(false);  // optimizers that live to the interpreter's end are no leak
  m.attr("STUB") = SWALP_STUB;
  nb::class_<SgdParameter>(m, "SgdParameter")
      .def(nb::init<std::vector<int64_t>, int64_t, int64_t>())
      .def("set_role", [](SgdParameter& p, const std::string& role, const swalp_format& f, int32_t rule,
                          int32_t bits, uint64_t seed, bool halved, uintptr_t table) {
        set(role == "gradient" ? p.gradient_role : role == "momentum" ? p.momentum_role : p.weight_role,
            f, rule, bits, seed, halved, table);
      })
      .def("place", &place_sgd)
      .def("bind", &bind<SgdParameter>);
  nb::class_<AdamParameter>(m, "AdamParameter")
      .def(nb::init<std::vector<int64_t>, int64_t, int64_t>())
      .def("set_role", [](AdamParameter& p, const std::string& role, const swalp_format& f, int32_t rule,
                          int32_t bits, uint64_t seed, bool halved, uintptr_t table) {
        set(role == "gradient"        ? p.gradient_role
            : role == "momentum"      ? p.moment_role
            : role == "second_moment" ? p.root_role
                                      : p.weight_role,
            f, rule, bits, seed, halved, table);
      })
      .def("place", &place_adam)
      .def("bind", &bind<AdamParameter>);
  m.def("bind_again", &bind_again<SgdParameter>);
  m.def("bind_again", &bind_again<AdamParameter>);
  m.def("sgd", [](const std::vector<SgdParameter*>& parameters, float lr, float momentum,
                  float weight_decay, bool nesterov, bool packed, bool has_gradient, int threads) {
    const swalp_sgd hyper = {lr, momentum, weight_decay, nesterov, packed, has_gradient, momentum != 0};
    return optimize(&swalp_sgd_step, hyper, parameters, threads);
  });
  m.def("adam", [](const std::vector<AdamParameter*>& parameters, float rate, float share1,
                   float beta2, float share2, float correction2, float eps, float weight_decay,
                   bool decoupled, bool packed, bool has_gradient, int threads) {
    const swalp_adam hyper = {rate, share1, beta2, share2, correction2, eps, weight_decay,
                              decoupled, packed, has_gradient};
    return optimize(&swalp_adam_step, hyper, parameters, threads);
  });
  using When = std::tuple<int64_t, int64_t, int64_t>;
  m.def("least_squares", [](int64_t size, uintptr_t weight, uintptr_t sum, uintptr_t squares,
                            const std::optional<swalp_format>& format, int32_t rule, int32_t bits,
                            uint64_t seed, const When& when, float rate, uintptr_t x, uintptr_t y,
                            uintptr_t rows, int64_t steps) {
    descend(size, weight, sum, squares, format, rule, bits, seed, when, [&](const swalp_descent* d) {
      return swalp_least_squares(d, rate, at<float>(x), at<float>(y), at<int64_t>(rows), steps);
    });
  });
  m.def("softmax", [](int64_t size, uintptr_t weight, uintptr_t sum, uintptr_t squares,
                      const std::optional<swalp_format>& format, int32_t rule, int32_t bits,
                      uint64_t seed, const When& when, float rate, int64_t features,
                      int64_t classes, int64_t batch, uintptr_t offsets, uintptr_t labels,
                      uintptr_t columns, uintptr_t values, float l2, uintptr_t rows, int64_t steps) {
    const swalp_softmax problem = {features, classes, batch, at<int64_t>(offsets),
                                   at<int64_t>(labels), at<int32_t>(columns), at<float>(values), l2};
    descend(size, weight, sum, squares, format, rule, bits, seed, when, [&](const swalp_descent* d) {
      return swalp_softmax_regression(d, &problem, rate, at<int64_t>(rows), steps);
    });
  });
  m.def("scalars", [](int64_t size, uintptr_t weight, uintptr_t sum, uintptr_t squares,
                      const std::optional<swalp_format>& format, int32_t rule, int32_t bits,
                      uint64_t seed, const When& when, float rate, bool skewed, uint64_t draws_seed,
                      int32_t draws_bits, uintptr_t table, int64_t steps) {
    const swalp_rounding draws = {SWALP_STOCHASTIC, draws_bits, draws_seed, 0, 0};
    descend(size, weight, sum, squares, format, rule, bits, seed, when, [&](const swalp_descent* d) {
      return swalp_scalars(d, rate, skewed, &draws, at<float>(table), steps);
    });
  });
  nb::class_<swalp_format>(m, "Format")
      .def("__init__", [](swalp_format* f) { *f = swalp_format{}; })
#define FIELD(name) .def_rw(#name, &swalp_format::name)
      FIELD(kind) FIELD(blocked) FIELD(element_exponent) FIELD(min_exponent) FIELD(max_exponent)
      FIELD(gap_offset) FIELD(min_integer) FIELD(max_integer) FIELD(symmetric_from)
      FIELD(mantissa_bits) FIELD(min_normal) FIELD(lowest_gap) FIELD(bias) FIELD(has_zero)
      FIELD(is_signed) FIELD(saturating) FIELD(fnuz) FIELD(overflow_is_nan) FIELD(largest_code)
      FIELD(inf_code) FIELD(has_nan) FIELD(nan_code) FIELD(sign_code) FIELD(largest) FIELD(smallest)
#undef FIELD
      ;
  nb::class_<swalp_layout>(m, "Layout")
      .def("__init__", [](swalp_layout* l, const std::vector<int64_t>& sizes,
                          const std::vector<int64_t>& extents, int64_t positions,
                          int64_t channels) { *l = layout(sizes, extents, positions, channels); })
      .def_static("rows_apart", &rows_apart);
  m.attr("GRID") = static_cast<int>(SWALP_GRID);
  m.attr("MINIFLOAT") = static_cast<int>(SWALP_MINIFLOAT);
  m.attr("BINARY") = static_cast<int>(SWALP_BINARY);
  m.attr("FLOAT32") = static_cast<int>(SWALP_FLOAT32);
  m.attr("CODE8") = static_cast<int>(SWALP_CODE8);
  m.attr("CODE16") = static_cast<int>(SWALP_CODE16);
  m.attr("BFLOAT16") = static_cast<int>(SWALP_BFLOAT16);
  m.attr("COMPENSATED") = static_cast<int>(SWALP_COMPENSATED);
  m.attr("MOVING32") = static_cast<int>(SWALP_MOVING32);
  m.attr("MOVING64") = static_cast<int>(SWALP_MOVING64);
  m.attr("SUM") = static_cast<int>(SWALP_SUM);
  m.def("quantize", &quantize);
  m.def("pack_block", &pack_block, nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg().none(), nb::arg(),
        nb::arg(), nb::arg(), nb::arg(), nb::arg());
  nb::class_<Layouts>(m, "Layouts")
      .def(nb::init<const Torch&, nb::handle, nb::list>())
      .def("hold", &Layouts::hold);
  nb::class_<Torch>(m, "Torch")
      .def(nb::init<nb::object, nb::object, nb::tuple, nb::object, bool>())
      .def("addresses", &Torch::addresses);
  m.def("quantize_plain", &quantize_plain, nb::arg(), nb::arg(), nb::arg().none(), nb::arg().none(),
        nb::arg().none(), nb::arg(), nb::arg(), nb::arg().none(), nb::arg(), nb::arg());
  m.def("quantize_many", &quantize_many);
  m.def("unpack", &unpack);
  m.def("split", &split);
  m.def("join", &join);
  m.def("quantize_part", &quantize_part);
  m.def("causal", [](std::tuple<int64_t, int64_t, int64_t> sizes, int64_t first, float factor, uintptr_t x,
                     int threads) {
    nb::gil_scoped_release unlocked;
    const auto& [planes, rows, columns] = sizes;
    swalp_causal(planes, rows, columns, first, factor, at<float>(x), threads);
  });
  m.def("relu", [](int64_t n, uintptr_t x, uintptr_t out, uintptr_t passed, int threads) {
    nb::gil_scoped_release unlocked;
    swalp_relu(n, at<float>(x), at<float>(out), at<uint8_t>(passed), threads);
  });
  m.def("relu_gradient", [](int64_t n, uintptr_t gradient, uintptr_t passed, uintptr_t out,
                            int threads) {
    nb::gil_scoped_release unlocked;
    swalp_relu_gradient(n, at<float>(gradient), at<uint8_t>(passed), at<float>(out), threads);
  });
  m.def("average", &average, nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(),
        nb::arg(), nb::arg().none(), nb::arg().none(), nb::arg(), nb::arg(), nb::arg());
  m.def("average_rounded", &average_rounded, nb::arg(), nb::arg(), nb::arg(), nb::arg(),
        nb::arg().none(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(),
        nb::arg());
  m.def("noise", &noise);
  m.def("matmul", &matmul, nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg().none(),
        nb::arg().none(), nb::arg().none(), nb::arg().none(), nb::arg().none(), nb::arg(), nb::arg().none(),
        nb::arg());
  m.def("product", &product, nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg().none(),
        nb::arg().none(), nb::arg().none(), nb::arg().none(), nb::arg().none(), nb::arg(), nb::arg().none());
  m.def("matmul_used", &swalp_multiply_used);
  nb::class_<Heads>(m, "Heads")
      .def(nb::init<const Torch&, nb::object, nb::handle, int64_t>(), nb::arg(), nb::arg(), nb::arg().none(),
           nb::arg())
      .def("part", &Heads::part, nb::arg().none(), nb::arg().none() = nb::none(), nb::arg().none() = nb::none())
      .def("transposed", &Heads::transposed)
      .def("view", &Heads::view)
      .def("exponent", &Heads::exponent);
  m.def("multiply", [](const Heads& left, const Heads& right, const Heads& out, int threads) {
    return multiply(left, right, out, threads);
  });
  m.def("linear", &linear, nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(),
        nb::arg(), nb::arg(), nb::arg().none(), nb::arg());
  m.def("linear_gradients", &linear_gradients, nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(),
        nb::arg(), nb::arg(), nb::arg(), nb::arg().none(), nb::arg(), nb::arg().none(), nb::arg(), nb::arg(),
        nb::arg());
  regions_at_fork();
  nb::class_<Buffers>(m, "Buffers")
      .def(nb::init<int64_t, int64_t, int64_t>())
      .def("empty", &Buffers::empty)
      .def("holds", &Buffers::holds)
      .def("free_bytes", &Buffers::free_bytes)
      .def("release", &Buffers::release)
      .def_static("of_torch", &Buffers::of_torch);
  nb::class_<swalp_convolution>(m, "Convolution")
      .def("__init__", [](swalp_convolution* c, const std::vector<int64_t>& sizes) {
        *c = convolution(sizes);
      });
  m.def("convolution_bytes", &convolution_bytes);
  m.def("convolution_pack", &convolution_pack);
  m.def("convolution_forward", &convolution_forward);
  m.def("convolution_input_gradient", &convolution_input_gradient);
  m.def("convolution_weight_gradient", &convolution_weight_gradient);
  m.def("channel_sums", [](uintptr_t codes, int64_t rows, int64_t channels, uintptr_t exponent, int gap,
                           uintptr_t out, int threads) {
    channel_sums(at<int8_t>(codes), rows, channels, at<int8_t>(exponent), gap, at<float>(out), threads);
  });
  nb::class_<swalp_pooling>(m, "Pooling")
      .def("__init__", [](swalp_pooling* p, const std::vector<int64_t>& sizes) {
        if (sizes.size() != sizeof(swalp_pooling) / sizeof(int64_t))
          throw nb::value_error("Pooling: 12 sizes");
        memcpy(p, sizes.data(), sizeof *p);
      });
  m.def("max_pool", [](const swalp_pooling& p, uintptr_t x, uintptr_t y, uintptr_t taps,
                       int threads) {
    nb::gil_scoped_release unlocked;
    swalp_max_pool(&p, at<float>(x), at<float>(y), at<uint8_t>(taps), threads);
  });
  m.def("max_pool_gradient", [](const swalp_pooling& p, uintptr_t dy, uintptr_t taps, uintptr_t dx,
                                int threads) {
    nb::gil_scoped_release unlocked;
    swalp_max_pool_gradient(&p, at<float>(dy), at<uint8_t>(taps), at<float>(dx), threads);
  });
  m.def("has_fast_convolution", [] { return swalp_has_fast_convolution() != 0; });
  m.def("use", [](const std::string& name) {
    if (!swalp_use(name.c_str()))
      throw nb::value_error(("this machine or build has no '" + name + "' kernels").c_str());
  });
  m.def("used", &swalp_used);
  m.def("has_threads", [] { return swalp_has_threads() != 0; });
}
