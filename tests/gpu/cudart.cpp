// A CUDA runtime for machines without a GPU: it hands every launch to a callback, and enforces the
// limits that the real one enforces at a launch. Loaded under the name of the real one before the
// library under test.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <string>
#include <unordered_map>
#include <utility>

namespace {

enum : int { success = 0, invalid_value = 1, no_kernel = 98, invalid_configuration = 9 };

struct dim3 {
  unsigned x, y, z;
};

using Launch = int (*)(const char* name, const unsigned* grid, const unsigned* block,
                       uint64_t shared, void** arguments);

struct Kernel {
  std::string name;
  uint64_t shared_limit = 48 * 1024;
};

struct Configuration {
  dim3 grid, block;
  size_t shared;
  void* stream;
};

Launch callback = nullptr;
int arch = 80, multiprocessors = 4, last_error = success;
std::unordered_map<const void*, Kernel>& kernels() {
  static auto* map = new std::unordered_map<const void*, Kernel>;
  return *map;
}
Configuration pushed;

uint64_t opt_in_limit() { return arch == 80 ? 166912 : arch < 90 || arch >= 120 ? 101376 : 232448; }

int failed(int error) { return error == success ? success : (last_error = error); }

int launch(const void* function, dim3 grid, dim3 block, void** arguments, size_t shared) {
  auto found = kernels().find(function);
  if (found == kernels().end() || !callback) return failed(no_kernel);
  if (shared > found->second.shared_limit) return failed(invalid_value);
  const uint64_t threads = uint64_t(block.x) * block.y * block.z;
  if (!grid.x || !grid.y || !grid.z || grid.y > 65535 || grid.z > 65535 || !threads ||
      threads > 1024 || block.z > 64) {
    return failed(invalid_configuration);
  }
  const unsigned g[] = {grid.x, grid.y, grid.z}, b[] = {block.x, block.y, block.z};
  return failed(callback(found->second.name.c_str(), g, b, shared, arguments));
}

}  // namespace

extern "C" {

void simulate(Launch to, int new_arch, int new_multiprocessors) {
  callback = to;
  arch = new_arch;
  multiprocessors = new_multiprocessors;
  last_error = success;
}

void** __cudaRegisterFatBinary(void*) {
  static void* handle;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void**, const char* host, char*, const char* name, int, void*, void*,
                            void*, void*, int*) {
  kernels()[host].name = name;
}
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, void* stream) {
  pushed = {grid, block, shared, stream};
  return 0;
}
int __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void** stream) {
  *grid = pushed.grid, *block = pushed.block, *shared = pushed.shared, *stream = pushed.stream;
  return success;
}
int __cudaGetKernel(const void** kernel, const void* function) {
  *kernel = function;
  return success;
}
int __cudaLaunchKernel(const void* kernel, dim3 grid, dim3 block, void** arguments, size_t shared,
                       void*) {
  return launch(kernel, grid, block, arguments, shared);
}
int cudaLaunchKernel(const void* function, dim3 grid, dim3 block, void** arguments, size_t shared,
                     void*) {
  return launch(function, grid, block, arguments, shared);
}
int cudaLaunchKernelExC(const Configuration* c, const void* function, void** arguments) {
  return launch(function, c->grid, c->block, arguments, c->shared);
}

int cudaFuncSetAttribute(const void* function, int attribute, int value) {
  constexpr int max_dynamic_shared = 8, shared_carveout = 9;
  auto found = kernels().find(function);
  if (found == kernels().end()) return failed(no_kernel);
  if (attribute == shared_carveout) return success;
  if (attribute != max_dynamic_shared || value < 0 || uint64_t(value) > opt_in_limit())
    return failed(invalid_value);
  found->second.shared_limit = std::max<uint64_t>(value, 48 * 1024);
  return success;
}

int cudaDeviceGetAttribute(int* value, int attribute, int) {
  static const std::unordered_map<int, int> fixed = {
      {1, 1024}, {8, 48 * 1024}, {10, 32}, {12, 65536}, {82, 65536}};
  auto found = fixed.find(attribute);
  if (found != fixed.end())
    *value = found->second;
  else if (attribute == 16)
    *value = multiprocessors;
  else if (attribute == 36)
    *value = arch == 80                  ? 1593000
             : arch == 90 || arch == 100 ? 2619000
                                         : 10501000;  // kHz of the memory
  else if (attribute == 37)
    *value = (arch == 80                  ? 47
              : arch == 90 || arch == 100 ? 39
                                          : 3) *
             multiprocessors;  // bits of its bus
  else if (attribute == 38)
    *value = (arch == 80 ? 370 : arch < 90 ? 562 : 378) * 1000 * multiprocessors;  // L2 bytes
  else if (attribute == 39)
    *value = arch == 80 || arch == 90 || arch == 100 ? 2048 : 1536;
  else if (attribute == 75)
    *value = arch / 10;
  else if (attribute == 76)
    *value = arch % 10;
  else if (attribute == 81)
    *value = int(opt_in_limit() + 1024);  // shared bytes of a multiprocessor
  else if (attribute == 97)
    *value = int(opt_in_limit());
  else if (attribute == 111)
    *value = 1024;
  else
    return failed(invalid_value);
  return success;
}

int cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, const void*, int threads,
                                                           size_t shared, unsigned) {
  int resident = 0;
  cudaDeviceGetAttribute(&resident, 39, 0);
  *blocks = std::min(resident / threads, int((opt_in_limit() + 1024) /
                                             (shared + 1024)));  // registers are not known here
  return success;
}
int cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void* function, int threads,
                                                  size_t shared) {
  return cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(blocks, function, threads, shared,
                                                                0);
}

int cudaGetDevice(int* device) { return *device = 0, success; }
int cudaSetDevice(int) { return success; }
int cudaGetDeviceCount(int* count) { return *count = 1, success; }
int cudaGetLastError() { return std::exchange(last_error, success); }
int cudaPeekAtLastError() { return last_error; }
const char* cudaGetErrorName(int error) { return error == success ? "cudaSuccess" : "cudaError"; }
const char* cudaGetErrorString(int error) {
  switch (error) {
    case success:
      return "no error";
    case invalid_value:
      return "invalid argument";
    case invalid_configuration:
      return "invalid configuration argument";
    case no_kernel:
      return "invalid device function";
    default:
      return "unspecified launch failure";
  }
}
int cudaDeviceSynchronize() { return success; }
int cudaStreamSynchronize(void*) { return success; }
int cudaMemsetAsync(void* to, int value, size_t bytes, void*) {
  return std::memset(to, value, bytes), success;
}
int cudaMemcpyAsync(void* to, const void* from, size_t bytes, int, void*) {
  return std::memmove(to, from, bytes), success;
}
}
