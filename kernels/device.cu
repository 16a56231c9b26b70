// device.cu: which CUDA devices there are, what each one is, and the switch to a tensor's device
// around an op.
#include "common.cuh"

#include <stdio.h>

enum { MAX_DEVICES = 64 };

struct Device {
    bool known;
    int code; // capability that the code loaded for it was compiled for, 10 * major + minor; 0: ?
    int major, minor, multiprocessors, shared_memory;
    char error[320];
};

// Filled once per device; two threads that race write the same values.
static Device devices[MAX_DEVICES];

static const char *describe(int device, Device **out) {
    if (device < 0 || device >= MAX_DEVICES) return "RuntimeError: no such CUDA device";
    Device *d = &devices[device];
    *out = d;
    if (__atomic_load_n(&d->known, __ATOMIC_ACQUIRE)) return nullptr;
    struct {
        int *value;
        cudaDeviceAttr name;
    } attributes[] = {
        {&d->major, cudaDevAttrComputeCapabilityMajor},
        {&d->minor, cudaDevAttrComputeCapabilityMinor},
        {&d->multiprocessors, cudaDevAttrMultiProcessorCount},
        {&d->shared_memory, cudaDevAttrMaxSharedMemoryPerBlockOptin},
    };
    for (auto &attribute : attributes) {
        cudaError_t error = cudaDeviceGetAttribute(attribute.value, attribute.name, device);
        if (error != cudaSuccess) return cudaGetErrorString(error);
    }
    __atomic_store_n(&d->known, true, __ATOMIC_RELEASE);
    return nullptr;
}

int multiprocessors(int device) {
    Device *d;
    return describe(device, &d) ? 0 : d->multiprocessors;
}

size_t max_shared_memory(int device) {
    Device *d;
    return describe(device, &d) ? 48 * 1024 : d->shared_memory;
}

const char *needs_hopper(int device) {
    Device *d;
    const char *error = describe(device, &d);
    if (error || d->major == 9) return error;
    return "NotImplementedError: this op needs compute capability 9.0 (H100, H200)";
}

bool has_dependent_launch() {
    int device;
    return cudaGetDevice(&device) == cudaSuccess && device < MAX_DEVICES &&
           __atomic_load_n(&devices[device].code, __ATOMIC_RELAXED) >= 90;
}

// Stands for all kernels: they are built for the same architectures.
static __global__ void __launch_bounds__(1) probe_kernel() {}

// Once per device, while it is current: find the code that the driver takes for it.
static const char *find_code(int device, Device *d) {
    cudaFuncAttributes probe;
    cudaError_t error = cudaFuncGetAttributes(&probe, probe_kernel);
    if (error == cudaSuccess) {
        __atomic_store_n(&d->code, probe.ptxVersion, __ATOMIC_RELAXED);
        return nullptr;
    }
    cudaDeviceProp properties;
    bool no_image =
        error == cudaErrorNoKernelImageForDevice || error == cudaErrorInvalidDeviceFunction;
    if (!no_image || cudaGetDeviceProperties(&properties, device) != cudaSuccess)
        return cudaGetErrorString(error);
    snprintf(
        d->error, sizeof d->error,
        "RuntimeError: cuda:%d (%.200s) has compute capability %d.%d, for which this build has "
        "no kernels (flatout.info() lists its architectures; 8.0 is the oldest possible)",
        device, properties.name, d->major, d->minor);
    return d->error;
}

extern "C" {
#pragma GCC visibility push(hidden)

// Make `device` current; *previous is the one to go back to, or stays -1 where it already was.
const char *cuda_enter(int device, int *previous) {
    Device *d;
    const char *error = describe(device, &d);
    if (error) return error;
    int current = -1;
    if (cudaGetDevice(&current) != cudaSuccess || current != device) {
        cudaError_t status = cudaSetDevice(device);
        if (status != cudaSuccess) return cudaGetErrorString(status);
        *previous = current;
    }
    return __atomic_load_n(&d->code, __ATOMIC_RELAXED) ? nullptr : find_code(device, d);
}

void cuda_leave(int previous) { cudaSetDevice(previous); }

int cuda_build_version(void) { return CUDART_VERSION; }

int cuda_device_count(void) {
    int count = 0;
    return cudaGetDeviceCount(&count) == cudaSuccess ? count : 0;
}

int cuda_multiprocessors(int device) { return multiprocessors(device); }

#pragma GCC visibility pop
}
