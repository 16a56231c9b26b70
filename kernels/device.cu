// device.cu: which CUDA devices there are, and the switch to a tensor's device around an op.
#include "common.cuh"

#include <stdio.h>

enum { MAX_DEVICES = 64 };

struct Device {
    bool known;
    int major, minor, multiprocessors, shared_memory;
};

// Filled once per device; two threads that race write the same values.
static Device devices[MAX_DEVICES];

static const char *describe(int device, const Device **out) {
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
    const Device *d;
    return describe(device, &d) ? 0 : d->multiprocessors;
}

size_t max_shared_memory(int device) {
    const Device *d;
    return describe(device, &d) ? 48 * 1024 : d->shared_memory;
}

extern "C" {
#pragma GCC visibility push(hidden)

// Make `device` current; *previous is the one to go back to, or stays -1 where it already was.
const char *cuda_enter(int device, int *previous) {
    const Device *d;
    const char *error = describe(device, &d);
    if (error) return error;
    if (d->major != 9 || d->minor != 0)
        return "RuntimeError: this build's kernels are for compute capability 9.0 (H100, H200), "
               "and the tensor's GPU has another";
    int current;
    if (cudaGetDevice(&current) == cudaSuccess && current == device) return nullptr;
    cudaError_t status = cudaSetDevice(device);
    if (status != cudaSuccess) return cudaGetErrorString(status);
    *previous = current;
    return nullptr;
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
