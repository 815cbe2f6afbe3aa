// The Python face of the cache of blocks: a block leaves as a DLPack capsule, whose deleter brings it back.
#include "block_bindings.h"

#include <pybind11/stl.h>

#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "block_cache.h"
#include "common/arguments.h"
#include "dlpack.h"

namespace py = pybind11;

namespace auxk {
namespace {

// What a tensor that lies in a block consists of, for as long as someone has it.
struct BlockTensor {
  DLManagedTensor managed;
  Block block;
  std::vector<int64_t> shape;
};

void delete_block_tensor(DLManagedTensor* managed) {
  const std::unique_ptr<BlockTensor> owner(static_cast<BlockTensor*>(managed->manager_ctx));
  return_block(owner->block);
}

// of a capsule that nobody has taken over
void delete_capsule(PyObject* capsule) {
  if (!PyCapsule_IsValid(capsule, kDLPackCapsule)) return;
  auto* managed = static_cast<DLManagedTensor*>(PyCapsule_GetPointer(capsule, kDLPackCapsule));
  managed->deleter(managed);
}

DLDataType dlpack_type_of(DType dtype) {
  return {dtype == DType::kBFloat16 ? kDLBfloat : kDLFloat, static_cast<uint8_t>(8 * size_of(dtype)), 1};
}

// Uninitialised, contiguous; None where the memory should be the allocator's.
py::object py_take_block(std::vector<int64_t> shape, int64_t dtype_code, int threads) {
  const DType dtype = dtype_of(dtype_code);
  int64_t bytes = size_of(dtype);
  for (const int64_t size : shape)
    if (__builtin_mul_overflow(bytes, size, &bytes)) return py::none();
  auto owner = std::make_unique<BlockTensor>();
  owner->shape = std::move(shape);
  {
    py::gil_scoped_release release;
    owner->block = take_block(bytes, threads);
  }
  if (owner->block.data == nullptr) return py::none();
  DLTensor& tensor = owner->managed.dl_tensor;
  tensor.data = owner->block.data, tensor.device = {kDLCPU, 0}, tensor.dtype = dlpack_type_of(dtype);
  tensor.ndim = static_cast<int32_t>(owner->shape.size()), tensor.shape = owner->shape.data();
  tensor.strides = nullptr, tensor.byte_offset = 0;
  owner->managed.manager_ctx = owner.get(), owner->managed.deleter = delete_block_tensor;
  py::object capsule =
      py::reinterpret_steal<py::object>(PyCapsule_New(&owner->managed, kDLPackCapsule, delete_capsule));
  if (!capsule) {
    delete_block_tensor(&owner.release()->managed);
    throw py::error_already_set();
  }
  owner.release();
  return capsule;
}

std::map<std::string, int64_t> py_block_counts() {
  const BlockCounts c = block_counts();
  return {{"allowed", c.allowed}, {"waiting_bytes", c.waiting_bytes},
          {"waiting", c.waiting}, {"used_bytes", c.used_bytes},
          {"used", c.used},       {"found", c.found},
          {"mapped", c.mapped}};
}

}  // namespace

void bind_blocks(py::module_& m) {
  m.def("take_block", &py_take_block, "An uninitialised tensor as a DLPack capsule, or None.");
  m.def("allow_waiting", &allow_waiting, py::call_guard<py::gil_scoped_release>());
  m.def("give_waiting_back", &give_waiting_back, py::call_guard<py::gil_scoped_release>());
  m.def("block_counts", &py_block_counts);
  m.def("fill_taken_blocks", &fill_taken_blocks, "Fills blocks with NaN when they are taken, for tests.");
}

}  // namespace auxk
