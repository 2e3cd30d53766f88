#include "placement.h"

namespace fastlr {

int host_devices = 0;

void route_host_to_cuda(int devices) { host_devices = devices; }

}  // namespace fastlr
