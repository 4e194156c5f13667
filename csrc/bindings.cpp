// SPDX-License-Identifier: Apache-2.0
// The Python module _C: the kernel table, CPU features, thread settings, build facts, and handles
// for sets of experts. The only file that sees pybind11; it sees no torch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <sys/mman.h>

#include <chrono>
#include <thread>
#include <tuple>

#include "cpu/features.h"
#include "cpu/kernel.h"
#include "cpu/limits.h"
#include "cpu/linear.h"
#include "cpu/nodes.h"
#include "cpu/threads.h"
#include "cuda/cuda.h"
#include "decode.h"
#include "expert_sets.h"
#include "handoff/away.h"
#include "handoff/desk.h"
#include "handoff/lane.h"
#include "handoff/spans.h"
#include "packing.h"
#include "quantize.h"
#include "registry.h"
#include "torch_team.h"

namespace py = pybind11;

namespace {

void throw_unless(const ey::Status& status) {
  if (!status.ok) throw py::value_error(status.what);
}

py::list kernel_table() {
  py::list out;
  for (const ey::cpu::Kernel* k : ey::kernels()) {
    py::list needs, missing;
    for (const auto& feature : ey::cpu::kFeatureNames) {
      if (!(k->needs & feature.bit)) continue;
      needs.append(feature.name);
      if (!(ey::cpu::features() & feature.bit)) missing.append(feature.name);
    }
    out.append(py::dict(py::arg("name") = ey::name_of(*k), py::arg("device") = "cpu",
                        py::arg("format") = ey::name_of(k->format),
                        py::arg("layout") = k->layout == ey::Layout::kRows ? "rows" : "blocks",
                        py::arg("mode") = ey::name_of(k->mode), py::arg("isa") = k->isa,
                        py::arg("rank") = k->rank, py::arg("bf16_inputs") = k->bf16_inputs,
                        py::arg("needs") = needs, py::arg("missing") = missing,
                        py::arg("runnable") = ey::runnable(*k)));
  }
  return out;
}

py::dict cpu_features() {
  py::dict out;
  for (const auto& feature : ey::cpu::kFeatureNames) {
    out[feature.name] = (ey::cpu::features() & feature.bit) != 0;
  }
  return out;
}

py::dict thread_limits() {
  const auto limits = ey::cpu::thread_limits();
  return py::dict(
      py::arg("affinity") = limits.affinity,
      py::arg("cgroup") = limits.cgroup ? py::object(py::int_(limits.cgroup)) : py::none(),
      py::arg("usable") = limits.usable());
}

template <class Enum>
Enum parse(const std::string& name, std::initializer_list<std::pair<const char*, Enum>> names) {
  std::string known;
  for (const auto& [text, value] : names) {
    if (name == text) return value;
    known += (known.empty() ? "" : ", ") + std::string(text);
  }
  throw py::value_error("'" + name + "' is not one of " + known);
}

ey::Format parse_format(const std::string& name) {
  return parse<ey::Format>(name, {{"bf16", ey::Format::kBf16},
                                  {"fp16", ey::Format::kFp16},
                                  {"fp32", ey::Format::kFp32},
                                  {"int8", ey::Format::kInt8},
                                  {"int4", ey::Format::kInt4},
                                  {"fp8", ey::Format::kFp8},
                                  {"mxfp4", ey::Format::kMxfp4}});
}

ey::Layout parse_layout(const std::string& name) {
  return parse<ey::Layout>(name, {{"rows", ey::Layout::kRows}, {"blocks", ey::Layout::kBlocks}});
}

ey::Mode parse_mode(const std::string& name) {
  return parse<ey::Mode>(name, {{"exact", ey::Mode::kExact}, {"fast", ey::Mode::kFast}});
}

ey::Packing parse_packing(ey::Format format, const std::string& scale_type, int64_t group_size,
                          bool zeros) {
  const auto type = parse<ey::ScaleType>(scale_type, {{"none", ey::ScaleType::kNone},
                                                      {"bf16", ey::ScaleType::kBf16},
                                                      {"fp16", ey::ScaleType::kFp16},
                                                      {"fp32", ey::ScaleType::kFp32},
                                                      {"e8m0", ey::ScaleType::kE8m0}});
  const ey::Packing packing{.scale_type = type, .group_size = group_size, .zeros = zeros};
  if (format != ey::Format::kFp32 && format != ey::Format::kFp16 &&
      !ey::is_packing(format, packing)) {
    throw py::value_error(std::string(ey::name_of(format)) + " with scales " + scale_type +
                          ", group_size " + std::to_string(group_size) + (zeros ? ", zeros" : "") +
                          " is not a packing");
  }
  return packing;
}

ey::BlockShape block_shape(const std::string& format, const std::string& scale_type,
                           int64_t group_size, bool zeros, int64_t k) {
  const ey::Format f = parse_format(format);
  if (f == ey::Format::kFp32 || f == ey::Format::kFp16) {
    throw py::value_error(format + " is not packed");
  }
  return {.format = f, .packing = parse_packing(f, scale_type, group_size, zeros), .k = k};
}

// What expertyard::linear takes for a packing.
int64_t linear_packing(const std::string& format, const std::string& scale_type, int64_t group_size,
                       bool zeros) {
  const auto shape = block_shape(format, scale_type, group_size, zeros, 0);
  return ey::LinearPacking{shape.format, shape.packing}.encode();
}

// Bytes of the blobs of one expert: (w13, w2).
std::pair<int64_t, int64_t> blob_bytes(const std::string& format, const std::string& scale_type,
                                       int64_t group_size, bool zeros, int64_t hidden_size,
                                       int64_t intermediate_size, bool has_gate) {
  const auto w13 = block_shape(format, scale_type, group_size, zeros, hidden_size);
  const auto w2 = block_shape(format, scale_type, group_size, zeros, intermediate_size);
  return {ey::w13_blocks(intermediate_size, has_gate) * w13.block_bytes(),
          ey::w2_blocks(hidden_size) * w2.block_bytes()};
}

// sources: one (codes, scales, zeros) of addresses a matrix: gate and up for w13, else one. Rows
// are contiguous: codes [rows, k], scales and zeros [rows, groups].
void pack_blob(const std::string& format, const std::string& scale_type, int64_t group_size,
               bool zeros, int64_t rows, int64_t k,
               const std::vector<std::array<uintptr_t, 3>>& sources, uintptr_t out) {
  const ey::BlockShape shape = block_shape(format, scale_type, group_size, zeros, k);
  if (sources.size() != 1 && sources.size() != 2) throw py::value_error("one matrix, or two");
  const py::gil_scoped_release others_may_run;
  ey::pack_matrices(shape, rows, sources.data(), static_cast<int>(sources.size()),
                    reinterpret_cast<char*>(out));
}

ey::DType parse_dtype(const std::string& name) {
  return parse<ey::DType>(
      name,
      {{"bfloat16", ey::DType::kBF16}, {"float16", ey::DType::kF16}, {"float32", ey::DType::kF32}});
}

// address, dtype or kind of blocks, bytes between rows
using PlainMatrix = std::tuple<uintptr_t, std::string, int64_t>;

ey::PlainRows plain_rows(const PlainMatrix& matrix, int64_t k) {
  const auto& [data, dtype, stride] = matrix;
  const ey::BlockDecoder decoder = ey::block_decoder(dtype.c_str());
  if (k % decoder.weights) throw py::value_error("k is no multiple of a block of " + dtype);
  return {reinterpret_cast<const char*>(data),
          decoder.decode ? ey::DType::kF32 : parse_dtype(dtype), stride, decoder};
}

ey::BlockShape codes_shape(const std::string& format, const std::string& scale_type,
                           int64_t group_size, bool zeros, int64_t k) {
  if (format == "bf16") throw py::value_error("bf16 has no codes");
  return block_shape(format, scale_type, group_size, zeros, k);
}

// to: addresses of codes [rows, k], scales and zeros [rows, groups].
void quantize_rows(const std::string& format, const std::string& scale_type, int64_t group_size,
                   bool zeros, bool search, int64_t rows, int64_t k, const PlainMatrix& source,
                   const std::array<uintptr_t, 3>& to) {
  const ey::BlockShape shape = codes_shape(format, scale_type, group_size, zeros, k);
  const ey::PlainRows from = plain_rows(source, k);
  const py::gil_scoped_release others_may_run;
  throw_unless(ey::quantize_rows(shape, from, rows, search, reinterpret_cast<uint8_t*>(to[0]),
                                 reinterpret_cast<char*>(to[1]), reinterpret_cast<char*>(to[2])));
}

// Like pack_blob, from plain weights: gate and up for w13, one matrix for w2.
void quantize_blob(const std::string& format, const std::string& scale_type, int64_t group_size,
                   bool zeros, bool search, int64_t rows, int64_t k,
                   const std::vector<PlainMatrix>& sources, uintptr_t out) {
  const ey::BlockShape shape = codes_shape(format, scale_type, group_size, zeros, k);
  if (sources.size() != 1 && sources.size() != 2) throw py::value_error("one matrix, or two");
  std::vector<ey::PlainRows> from;
  for (const auto& source : sources) from.push_back(plain_rows(source, k));
  const py::gil_scoped_release others_may_run;
  throw_unless(ey::quantize_blob(shape, rows, from.data(), static_cast<int>(from.size()), search,
                                 reinterpret_cast<char*>(out)));
}

const ey::cpu::Kernel& kernel_called(const std::string& name) {
  for (const ey::cpu::Kernel* k : ey::kernels()) {
    if (name != ey::name_of(*k)) continue;
    if (!ey::runnable(*k)) throw py::value_error("this CPU cannot run the kernel " + name);
    return *k;
  }
  throw py::value_error("no kernel is called '" + name + "'");
}

std::string kernel_name(const std::string& format, const std::string& hidden_dtype,
                        const std::string& layout, const std::string& mode) {
  const auto dtype = parse_dtype(hidden_dtype);
  const ey::cpu::Kernel* kernel = nullptr;
  throw_unless(ey::select_kernel(parse_format(format), parse_layout(layout), parse_mode(mode),
                                 dtype, &kernel));
  return ey::name_of(*kernel);
}

// Every CUDA device of this machine and whether this build can use it; "why" says why it cannot use
// any of them. Asking makes a context on each device (some hundred MB of its memory).
py::dict cuda_status() {
  int count = 0;
  const ey::Status counted = ey::cuda::device_count(&count);
  py::list devices;
  for (int i = 0; i < count; ++i) {
    ey::cuda::DeviceFacts facts;
    ey::Status usable = ey::cuda::device_facts(i, &facts);
    if (usable.ok) usable = ey::cuda::prepare(i);
    devices.append(py::dict(
        py::arg("name") = facts.name,
        py::arg("capability") = std::to_string(facts.major) + "." + std::to_string(facts.minor),
        py::arg("multiprocessors") = facts.multiprocessors,
        py::arg("total_bytes") = facts.total_bytes, py::arg("free_bytes") = facts.free_bytes,
        py::arg("usable") = usable.ok,
        py::arg("why") = usable.ok ? py::object(py::none()) : py::object(py::str(usable.what))));
  }
  return py::dict(
      py::arg("built") = ey::cuda::runtime_version() != 0, py::arg("usable") = counted.ok,
      py::arg("why") = counted.ok ? py::object(py::none()) : py::object(py::str(counted.what)),
      py::arg("driver_version") = ey::cuda::driver_version(),
      py::arg("runtime_version") = ey::cuda::runtime_version(),
      py::arg("architectures") = ey::cuda::architectures(), py::arg("devices") = devices);
}

// None, or why experts cannot be on this CUDA device.
py::object cuda_problem(int device) {
  const ey::Status status = ey::cuda::prepare(device);
  return status.ok ? py::object(py::none()) : py::object(py::str(status.what));
}

ey::ExpertPointers pointers_of(const std::array<uintptr_t, 6>& p) {
  return {.gate = reinterpret_cast<const void*>(p[0]),
          .up = reinterpret_cast<const void*>(p[1]),
          .down = reinterpret_cast<const void*>(p[2]),
          .gate_bias = reinterpret_cast<const float*>(p[3]),
          .up_bias = reinterpret_cast<const float*>(p[4]),
          .down_bias = reinterpret_cast<const float*>(p[5])};
}

// pointers: one (gate, up, down, gate_bias, up_bias, down_bias) of addresses an expert; 0 is null.
// device: -1 for the CPU, else the CUDA device that the addresses are of.
// The caller checks shapes and keeps the memory alive until remove_experts.
int64_t add_experts(const std::string& format, const std::string& activation, float alpha,
                    float limit, int64_t hidden_size, int64_t intermediate_size,
                    int64_t gate_up_row_stride, int64_t down_row_stride,
                    const std::vector<std::array<uintptr_t, 6>>& pointers, int device,
                    const std::string& layout, const std::string& mode,
                    const std::string& scale_type, int64_t group_size, bool zeros) {
  const ey::Format parsed = parse_format(format);
  const ey::Layout parsed_layout = parse_layout(layout);
  auto entry = std::make_unique<ey::ExpertSetEntry>();
  entry->pointers.reserve(pointers.size());
  for (const auto& p : pointers) entry->pointers.push_back(pointers_of(p));
  entry->set = {.format = parsed,
                .layout = parsed_layout,
                .mode = parse_mode(mode),
                .packing = parsed_layout == ey::Layout::kBlocks
                               ? parse_packing(parsed, scale_type, group_size, zeros)
                               : ey::Packing{},
                .activation = parse<ey::Activation>(
                    activation, {{"silu", ey::Activation::kSiluGlu},
                                 {"gelu_tanh", ey::Activation::kGeluTanhGlu},
                                 {"swigluoai", ey::Activation::kSwigluOai},
                                 {"silu_clamp_before", ey::Activation::kSiluGluClampBefore},
                                 {"silu_clamp_after", ey::Activation::kSiluGluClampAfter},
                                 {"softcap_silu", ey::Activation::kSoftcapGlu},
                                 {"relu2", ey::Activation::kRelu2}}),
                .alpha = alpha,
                .limit = limit,
                .num_experts = static_cast<int64_t>(pointers.size()),
                .hidden_size = hidden_size,
                .intermediate_size = intermediate_size,
                .gate_up_row_stride = gate_up_row_stride,
                .down_row_stride = down_row_stride,
                .experts = entry->pointers.data()};
  if (device >= 0) {
    throw_unless(ey::cuda::make_table(device, entry->pointers.data(), &entry->set));
    entry->device = device;
    entry->release = [](ey::ExpertSetEntry& e) { ey::cuda::free_table(e.device, &e.set); };
  }
  return ey::add_expert_set(std::move(entry));
}

std::shared_ptr<ey::ExpertSetEntry> live(int64_t handle) {
  auto entry = ey::find_expert_set(handle);
  if (entry == nullptr) throw py::value_error(std::to_string(handle) + " is not a live handle");
  return entry;
}

// An expert comes, goes (all 0) or lies elsewhere from now on. No call on the set may be running.
void write_expert(int64_t handle, int64_t expert, const std::array<uintptr_t, 6>& pointers) {
  const auto entry = live(handle);
  if (expert < 0 || expert >= entry->set.num_experts) throw py::index_error("no such expert");
  if (entry->device >= 0) {
    throw_unless(ey::cuda::write_row(entry->device, expert, pointers_of(pointers), &entry->set));
  }
  entry->pointers[expert] = pointers_of(pointers);
}

// For hidden states that start at a multiple of 16 bytes, as all but odd views do.
std::string cuda_kernel_name(int64_t handle, const std::string& hidden_dtype, int64_t num_tokens,
                             int64_t top_k) {
  const auto entry = live(handle);
  if (entry->device < 0) throw py::value_error("these experts are on the CPU");
  ey::MoeArgs args{};
  args.num_tokens = num_tokens;
  args.top_k = top_k;
  args.hidden_dtype = parse_dtype(hidden_dtype);
  args.set = &entry->set;
  return ey::kind_of(args.set->format, args.set->layout, args.set->mode) + "_" +
         ey::cuda::kernel_isa(args);
}

// Raises what the GPU has reported of earlier calls. Call it after a synchronisation to be sure.
void check_experts(int64_t handle) { throw_unless(ey::cuda::take_bad_id(live(handle)->set)); }

// A job that does nothing for so long: what a device that hangs looks like.
class Idle : public ey::handoff::Job {
 public:
  explicit Idle(double seconds) : seconds_(seconds) {}
  ey::Status run() override {
    std::this_thread::sleep_for(std::chrono::duration<double>(seconds_));
    return {};
  }

 private:
  const double seconds_;
};

void occupy_lane(int64_t lane, double seconds) {
  auto& found = ey::handoff::lane("cuda:" + std::to_string(lane), 1);
  throw_unless(found.submit(std::make_shared<Idle>(seconds)));
}

// For calls of one shape whose hidden states are on a GPU and whose experts are in RAM too.
int64_t add_desk(int device, int64_t num_tokens, int64_t hidden_size, int64_t top_k,
                 const std::string& hidden_dtype, int threads, double timeout,
                 bool host_functions) {
  std::unique_ptr<ey::handoff::Desk> desk;
  throw_unless(ey::handoff::Desk::make(device,
                                       {.num_tokens = num_tokens,
                                        .hidden_size = hidden_size,
                                        .top_k = top_k,
                                        .hidden_dtype = parse_dtype(hidden_dtype)},
                                       {.threads = threads,
                                        .timeout_ns = static_cast<int64_t>(timeout * 1e9),
                                        .host_functions = host_functions},
                                       &desk));
  return ey::handoff::desks().add(std::move(desk));
}

// For the parts of calls of one shape that another GPU computes, in one CUDA graph.
int64_t add_away(int home, int there, int64_t num_tokens, int64_t hidden_size, int64_t top_k,
                 const std::string& hidden_dtype, const std::string& weights_dtype,
                 bool ids_are_int64) {
  const ey::cuda::BranchShape shape = {.num_tokens = num_tokens,
                                       .hidden_size = hidden_size,
                                       .top_k = top_k,
                                       .hidden_dtype = parse_dtype(hidden_dtype),
                                       .weights_dtype = parse_dtype(weights_dtype),
                                       .ids_are_int64 = ids_are_int64};
  return ey::handoff::aways().add(std::make_unique<ey::handoff::Away>(home, there, shape));
}

// Which graph the stream (a cudaStream_t) is captured into; 0: none.
uint64_t capture_id(int device, uintptr_t stream) {
  uint64_t id = 0;
  throw_unless(ey::cuda::capture_id(device, reinterpret_cast<void*>(stream), &id));
  return id;
}

// Raises what went wrong with an earlier question.
void check_desk(int64_t handle) {
  const auto desk = ey::handoff::desks().find(handle);
  if (desk == nullptr) throw py::value_error(std::to_string(handle) + " is not a live handle");
  const py::gil_scoped_release others_may_run;
  throw_unless(desk->check(true));
}

// Of this thread's last moe_parts: (lane, begin, end) of each part, ns of time.perf_counter_ns.
std::vector<std::tuple<int64_t, int64_t, int64_t>> last_spans() {
  std::vector<std::tuple<int64_t, int64_t, int64_t>> out;
  for (const auto& s : ey::handoff::spans()) out.emplace_back(s.lane, s.begin_ns, s.end_ns);
  return out;
}

py::dict experts_info(int64_t handle) {
  const auto entry = live(handle);
  const char* isa = entry->last_isa.load(std::memory_order_relaxed);
  const ey::ExpertSet& set = entry->set;
  const std::string kind = ey::kind_of(set.format, set.layout, set.mode);
  return py::dict(
      py::arg("format") = ey::name_of(set.format),
      py::arg("last_kernel") = isa ? py::object(py::str(kind + "_" + isa)) : py::object(py::none()),
      py::arg("calls") = entry->calls.load(std::memory_order_relaxed));
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Expertyard's native module. Import torch before it; use the Python layer above it.";
  m.def("kernels", &kernel_table);
  m.def("cpu_features", &cpu_features);
  m.def("thread_limits", &thread_limits);
  m.def("team", [] {
    if (const ey::Status known = ey::TorchTeam::check(); !known.ok)
      throw py::value_error(known.what);
    return ey::TorchTeam::name();
  });
  m.def("cuda_status", &cuda_status);
  m.def("cuda_problem", &cuda_problem, py::arg("device"));
  m.def("kernel_name", &kernel_name, py::arg("format"), py::arg("hidden_dtype"),
        py::arg("layout") = "rows", py::arg("mode") = "exact");
  m.def("cuda_kernel_name", &cuda_kernel_name, py::arg("handle"), py::arg("hidden_dtype"),
        py::arg("num_tokens"), py::arg("top_k"));
  m.def(
      "force_isa", [](const char* isa) { throw_unless(ey::force_isa(isa)); },
      py::arg("isa").none(true));
  m.def("forced_isa", &ey::forced_isa);
  m.def("add_experts", &add_experts, py::arg("format"), py::arg("activation"), py::arg("alpha"),
        py::arg("limit"), py::arg("hidden_size"), py::arg("intermediate_size"),
        py::arg("gate_up_row_stride"), py::arg("down_row_stride"), py::arg("pointers"),
        py::arg("device") = -1, py::arg("layout") = "rows", py::arg("mode") = "exact",
        py::arg("scale_type") = "none", py::arg("group_size") = 0, py::arg("zeros") = false);
  m.def(
      "decode_ggml",
      [](const char* kind, uintptr_t blocks, int64_t count, uintptr_t out) {
        throw_unless(ey::decode_ggml(kind, reinterpret_cast<const uint8_t*>(blocks), count,
                                     reinterpret_cast<void*>(out)));
      },
      py::arg("kind"), py::arg("blocks"), py::arg("count"), py::arg("out"),
      py::call_guard<py::gil_scoped_release>());
  m.def(
      "decode_words",
      [](bool awq, uintptr_t words, int64_t inputs, int64_t outputs, uintptr_t codes) {
        (awq ? ey::decode_awq : ey::decode_gptq)(reinterpret_cast<const uint32_t*>(words), inputs,
                                                 outputs, reinterpret_cast<uint8_t*>(codes));
      },
      py::arg("awq"), py::arg("words"), py::arg("inputs"), py::arg("outputs"), py::arg("codes"),
      py::call_guard<py::gil_scoped_release>());
  m.def("linear_packing", &linear_packing, py::arg("format"), py::arg("scale_type"),
        py::arg("group_size"), py::arg("zeros"));
  m.def("blob_bytes", &blob_bytes, py::arg("format"), py::arg("scale_type"), py::arg("group_size"),
        py::arg("zeros"), py::arg("hidden_size"), py::arg("intermediate_size"),
        py::arg("has_gate"));
  m.def("pack_blob", &pack_blob, py::arg("format"), py::arg("scale_type"), py::arg("group_size"),
        py::arg("zeros"), py::arg("rows"), py::arg("k"), py::arg("sources"), py::arg("out"));
  m.def("quantize_rows", &quantize_rows, py::arg("format"), py::arg("scale_type"),
        py::arg("group_size"), py::arg("zeros"), py::arg("search"), py::arg("rows"), py::arg("k"),
        py::arg("source"), py::arg("to"));
  m.def("quantize_blob", &quantize_blob, py::arg("format"), py::arg("scale_type"),
        py::arg("group_size"), py::arg("zeros"), py::arg("search"), py::arg("rows"), py::arg("k"),
        py::arg("sources"), py::arg("out"));
  m.def(
      "advise_huge_pages",
      [](uintptr_t memory, size_t bytes) {  // advice: failure costs speed only
        madvise(reinterpret_cast<void*>(memory), bytes, MADV_HUGEPAGE);
      },
      py::arg("memory"), py::arg("bytes"));
  m.def("num_nodes", &ey::cpu::num_nodes);
  m.def("may_place", &ey::cpu::may_place);
  m.def("pretend_nodes", &ey::cpu::pretend_nodes, py::arg("nodes"));
  m.def(
      "place_blobs",
      [](uintptr_t arena, const std::vector<int64_t>& blob_bytes, int64_t count) {
        return ey::cpu::place_blobs(reinterpret_cast<char*>(arena), blob_bytes, count,
                                    ey::cpu::thread_limits().usable());
      },
      py::arg("arena"), py::arg("blob_bytes"), py::arg("count"),
      py::call_guard<py::gil_scoped_release>());
  m.def("remove_experts", &ey::remove_expert_set, py::arg("handle"));
  m.def("write_expert", &write_expert, py::arg("handle"), py::arg("expert"), py::arg("pointers"));
  m.def("occupy_lane", &occupy_lane, py::arg("lane"), py::arg("seconds"));
  m.def("last_spans", &last_spans);
  m.def("add_desk", &add_desk, py::arg("device"), py::arg("num_tokens"), py::arg("hidden_size"),
        py::arg("top_k"), py::arg("hidden_dtype"), py::arg("threads"), py::arg("timeout"),
        py::arg("host_functions"));
  m.def("check_desk", &check_desk, py::arg("desk"));
  m.def("remove_desk", [](int64_t desk) { ey::handoff::desks().remove(desk); }, py::arg("desk"));
  m.def("add_away", &add_away, py::arg("home"), py::arg("there"), py::arg("num_tokens"),
        py::arg("hidden_size"), py::arg("top_k"), py::arg("hidden_dtype"), py::arg("weights_dtype"),
        py::arg("ids_are_int64"));
  m.def("remove_away", [](int64_t away) { ey::handoff::aways().remove(away); }, py::arg("away"));
  m.def("capture_id", &capture_id, py::arg("device"), py::arg("stream"));
  m.def("limit_caller", &ey::cpu::limit_caller, py::arg("threads"));
  m.def("check_experts", &check_experts, py::arg("handle"));
  m.def("experts_info", &experts_info, py::arg("handle"));
  m.def(
      "read_gbps",
      [](const std::string& kernel, uintptr_t memory, int64_t bytes, int threads) {
        const ey::TorchTeam team;  // as calls
        return ey::cpu::read_gbps(kernel_called(kernel), reinterpret_cast<const char*>(memory),
                                  bytes, threads);
      },
      py::arg("kernel"), py::arg("memory"), py::arg("bytes"), py::arg("threads"));
  m.def(
      "peak_gflops",
      [](const std::string& kernel, int threads) {
        const ey::TorchTeam team;
        return ey::cpu::peak_gflops(kernel_called(kernel), threads);
      },
      py::arg("kernel"), py::arg("threads"));
  m.def("dispatch_us", &ey::cpu::dispatch_us, py::arg("threads"));
  m.attr("build") = py::dict(
      py::arg("compiler") = "g++ " __VERSION__, py::arg("torch_target") = EY_TORCH_TARGET,
      py::arg("cuda") = EY_CUDA_VERSION, py::arg("cuda_architectures") = EY_CUDA_ARCHITECTURES);
}
